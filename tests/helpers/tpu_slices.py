"""A gcloud that is a folder: slices of two hosts each, whose programs run here, and a queue for them."""

import os
import pathlib
import signal
import subprocess

from stand_ins import LAUNCH, environment, program

# Notes every call. A slice or queued resource has its state in a file; a host is a folder, and ssh a shell in it. As
# the real one, ssh on several hosts returns the first code that is not 0, names each that failed, and repeats what lost
# its connection (but for a host that is gone: CUT). The file `lose` has it lose the next run's.
GCLOUD = r"""
echo "$*" >> "$CLOUD/calls"
kind=$3 action=$4 all=$*
shift 4
case $kind.$action in
  *.list)
    name=${all##*\"/} && name=${name%%\$*}
    if [ -e "$CLOUD/broken" ]; then echo "ERROR: not logged in" >&2; exit 1; fi
    cat "$CLOUD/$kind.$name" 2>/dev/null
    exit 0 ;;
  queued-resources.create) echo ACCEPTED > "$CLOUD/$kind.$1" ;;
  queued-resources.delete) rm "$CLOUD/$kind.$1" ;;
  tpu-vm.scp)
    node=${2%%:*}
    for host in 0 1; do
      mkdir -p "$CLOUD/$node/$host" && cp "$1" "$CLOUD/$node/$host/${2#*:}"
    done ;;
  tpu-vm.ssh)
    node=$1 command=${all##*--command } status=0
    if [ -e "$CLOUD/lose" ] && [[ $command = *" run "* ]]; then # the connection, while the programs run
      for host in 0 1; do
        # Nobody reads what they go on saying.
        (cd "$CLOUD/$node/$host" && HOST=$node.$host setsid bash -c "$command" 2>&1 | true) >/dev/null 2>&1 &
      done
      until [ "$(ls -d "$CLOUD"/*.ready 2>/dev/null | wc -l)" = 2 ]; do sleep 1; done
      rm "$CLOUD/lose"
      exit 255
    fi
    for host in 0 1; do
      (cd "$CLOUD/$node/$host" && HOST=$node.$host exec bash -c "$command") & pids[host]=$!
    done
    for host in 0 1; do
      code=0
      wait "${pids[host]}" || code=$?
      if [ $code = 255 ] && [ -z "${CUT:-}" ]; then
        (cd "$CLOUD/$node/$host" && HOST=$node.$host exec bash -c "$command")
        code=$?
      fi
      [ $code = 0 ] || echo "##### Command execution on worker $host failed with exit status $code. Continuing."
      [ $status != 0 ] || status=$code
    done
    exit $status ;;
esac
"""
# A python of the version in the file `version` beside it: makes environments, installs, and runs what `behaviour` says.
PYTHON = r"""
case "$1 $2" in
  '-c '*) [ "$(cat "${0%/*}/version.${0##*/}" 2>/dev/null || echo 3.12)" != old ] ;;
  '-m venv') echo "${0##*/}" > made_with; mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  '-m pip') echo "$*" >> "$CLOUD/installed.$HOST"
    if [ "$6" = --target ]; then mkdir -p uv/bin && cp "$CLOUD/bin/uv" uv/bin/uv; fi ;;
  '-m diffusion_t5x.'*) echo "$*" >> "$CLOUD/ran.$HOST"; source "$CLOUD/behaviour" ;;
esac
"""
# The checkout has changes that are not committed where the file `uncommitted` says so.
GIT = f"""
case $3 in
  status) cat "$CLOUD/uncommitted" 2>/dev/null || true ;;
  archive) tar -czf "${{5#--output=}}" -C {LAUNCH.parent} launch setup.py pyproject.toml ;;
esac
"""
SLEEP = """
[ "$1" != 60 ] || source "$CLOUD/meanwhile"
exec /bin/sleep 0.02
"""
UV = 'echo uv > made_with; mkdir -p "$6/bin" && cp "$CLOUD/bin/python3.12" "$6/bin/python"\n'


class Cloud:
    """The folder, with a slice `a` that is ready and python3 as the hosts' only one."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        for name, script in {
            "gcloud": GCLOUD,
            "git": GIT,
            "hostname": 'echo "$HOST"\n',
            "sleep": SLEEP,
            **dict.fromkeys(("python3", "python3.11", "python3.12", "python3.13"), PYTHON),
            "uv": UV,
        }.items():
            program(folder / "bin" / name, script)
        self.behave("exit 0")
        self.meanwhile("exit 1")
        self.state("tpu-vm.a", "READY")

    def behave(self, script: str) -> None:
        """Sets what the verb does on each host, in bash."""
        (self.folder / "behaviour").write_text(f"{script}\n")

    def meanwhile(self, script: str) -> None:
        """Sets what happens in the minute in which the launcher waits for slices."""
        (self.folder / "meanwhile").write_text(f"{script}\n")

    def state(self, name: str, state: str) -> None:
        (self.folder / name).write_text(f"{state}\n")

    def start(self, *arguments: str, name: str = "a", **variables: str) -> subprocess.Popen:
        """Starts the launcher for `train --a='b c'`."""
        command = ["bash", LAUNCH / "tpu_vm.sh", "--name", name, "--zone", "z", *arguments, "--", "train", "--a=b c"]
        given = {"CLOUD": str(self.folder), "TMPDIR": str(self.folder), **variables}
        clean = environment(self.folder / "bin", **given)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen(command, cwd=self.folder, env=clean, **options)

    def run(self, *arguments: str, **options: str) -> tuple[int, str]:
        """Exit code and standard error of the launcher."""
        process = self.start(*arguments, **options)
        try:
            errors = process.communicate(timeout=60)[1]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, errors

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def times(self, what: str, node: str = "a") -> list[int]:
        """Number of lines of `ran` or `installed` for each host of a slice."""
        return [len(self.lines(f"{what}.{node}.{host}")) for host in (0, 1)]
