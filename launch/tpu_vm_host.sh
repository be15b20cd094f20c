#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each host of a slice. The checkout is `code` (`new`, before it is set up) in a folder of the
# run, which also holds the environment `venv`; `pid` names the run's process. Usage:
#
#   bash tpu_vm_host.sh set_up                     ends what an earlier attempt left, installs what has changed
#   bash tpu_vm_host.sh run ATTEMPT VERB FLAGS...  runs a verb; a second time in one attempt, ends the first: code 75
#   bash tpu_vm_host.sh end                        tells the run to stop, and waits until it has saved
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fits() { "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

make_venv() {
  local python
  rm -rf venv
  for python in python3 python3.13 python3.12 python3.11; do
    if fits "$python"; then
      "$python" -m venv venv
      return
    fi
  done
  # The image of a TPU VM may have an older one only. uv brings one.
  python3 -m pip install -q --upgrade --target uv uv
  uv/bin/uv venv -q --seed --python 3.12 venv
}

is_running() { [ -e pid ] && grep -qs 'diffusion_t5x\.' "/proc/$(<pid)/cmdline"; }

end() {
  local i
  is_running || return 0
  echo "ending process $(<pid): it saves first" >&2
  kill -TERM "$(<pid)" || true
  for ((i = 0; i < 60; i++)); do
    is_running || return 0
    sleep 5
  done
  kill -KILL "$(<pid)" || true
}

set_up() {
  local key
  exec 9>lock
  flock 9 # an earlier connection may be lost, and its installation still at work
  end
  rm -rf code
  mv new code
  key=$(cat code/setup.py code/pyproject.toml | cksum)
  [ ! -e ready ] || [ "$(cat ready)" != "$key" ] || return 0
  fits venv/bin/python || make_venv
  venv/bin/python -m pip install -q -e './code[tpu]'
  echo "$key" >ready
}

run() {
  local attempt=$1 verb=$2
  # gcloud repeats a command whose connection was lost. The other hosts' processes are those of the first time: all end.
  if [ -e attempt ] && [ "$(cat attempt)" = "$attempt" ]; then
    end
    exit 75
  fi
  echo "$attempt" >attempt
  echo $$ >pid
  cd code
  # Once the connection is lost, the output is read on: the process could fail before it has saved.
  exec ../venv/bin/python -m "diffusion_t5x.$verb" "${@:3}" --distributed \
    > >(sed -u "s/^/$(hostname): /" || cat >/dev/null) 2>&1
}

"$@"
