"""The one writer of whole files: what was there stays until what is new is there."""

import ast
import os
import pathlib
import resource
import signal
import stat
import subprocess
import sys
import threading

import pytest

from diffusion_t5x import records
from diffusion_t5x.errors import UserError

PACKAGE = pathlib.Path(records.__file__).parent
# Places that open a file for writing by themselves, and why.
APPENDING = {"training/metrics.py", "evaluation/record_file.py", "training/lock.py"}
# /proc, /dev/null, scratch files, the standard streams
SYSTEM = {"evaluation/code/sandbox/isolation.py", "data/train_iterator.py", "terminal.py"}
REMOTE = {"checkpointing/manifest.py", "checkpointing/checkpoints.py"}  # where a bucket writes whole objects itself
OF_A_LIBRARY = {"data/cache_writer.py"}  # the library opens the file; it is renamed when it is whole


@pytest.mark.parametrize(
    "write,content,expected",
    [
        (records.write_text, "é\n", "é\n".encode()),
        (records.write_bytes, b"\0\r\n", b"\0\r\n"),
        (records.write_json, {"é": [1]}, '{\n  "é": [\n    1\n  ]\n}\n'.encode()),
        (records.write_json_lines, [{"a": "é\r\n"}, {"b": 2}], '{"a": "é\\r\\n"}\n{"b": 2}\n'.encode()),
    ],
)
def test_a_file_and_its_folders_are_made_and_replaced(tmp_path, write, content, expected):
    path = tmp_path / "new" / ("name" + 245 * "x")  # as long as a name may be
    for _ in range(2):
        write(path, content)
        assert path.read_bytes() == expected
    assert list(path.parent.iterdir()) == [path]


def test_what_breaks_off_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "predictions.jsonl"
    records.write_text(path, "old")

    def breaks_off():
        yield {"a": 1}
        raise KeyError("no answer")

    with pytest.raises(KeyError):
        records.write_json_lines(path, breaks_off())
    with pytest.raises(UnicodeEncodeError):
        records.write_text(path, "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


_KILLED = """
import sys, time
from diffusion_t5x import records
with records.replacing(sys.argv[1]) as file:
    file.write("new\\n" * 100_000)
    file.flush()
    print("half", flush=True)
    time.sleep(600)
"""


def test_a_kill_leaves_the_old_content(tmp_path):
    path = tmp_path / "results.json"
    records.write_text(path, "old")
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.read_text() == "old"
    records.write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o007, 0o660)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        records.write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("elsewhere")
    for text in ("first", "second"):  # the second time it points to a file
        records.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere").read_text() == text


def test_pipes_and_devices_are_written_to_as_they_are(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    records.write_text(tmp_path / "pipe", "through")
    reader.join(60)
    assert read == ["through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    program = "from diffusion_t5x import records; records.write_text('/dev/stdout', 'printed')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "printed", done.stderr


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*file/below: (Not a directory|File exists)"):
        records.write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(UserError, match="Cannot write /proc/none"):
        records.write_text("/proc/none", "x")


def test_a_full_disk_is_one_message_and_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    records.write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"Cannot write .*file: File too large"):
            records.write_text(path, "x" * (1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def _writes(call: ast.Call) -> bool:
    """True for a call that writes a file without the help of `records`."""
    name = ast.unparse(call.func)
    modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
    opens = name.rpartition(".")[2] == "open" and any(
        isinstance(mode, str) and len(mode) < 4 and {*mode} & {*"wax+"} for mode in modes
    )
    by_itself = name.rpartition(".")[2] in ("write_text", "write_bytes") and not name.startswith("records.")
    return opens or (by_itself and not isinstance(call.func, ast.Name)) or name == "os.replace"


def test_nothing_else_writes_files_by_itself():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        if any(map(_writes, calls)):
            found.add(path.relative_to(PACKAGE).as_posix())
    assert found - {"records.py"} == APPENDING | SYSTEM | REMOTE | OF_A_LIBRARY
