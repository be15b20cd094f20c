"""Programs run on tests: right ones pass, wrong ones fail, and hostile ones neither cheat nor do harm."""

import ast
import gzip
import json
import os
import pathlib
import platform
import re
import socket

import pytest
from programs import QUICK, RIGHT, TESTS, one

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.code import execution as code_execution
from diffusion_t5x.evaluation.code.execution import Limits, Protections, Tests, Verdict, check

pytestmark = pytest.mark.usefixtures("isolation")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "program,status,detail",
    [
        (RIGHT, "pass", ""),
        ("def double(x):\n    return 2 * x if x == 2 else x", "wrong", "test 2"),
        ("def double(x):\n    return 4", "wrong", "test 2 of 3: assert double('ab')"),
        ("def double(x):\n    return 2 * x + undefined", "error", "test 1 of 3: NameError: name 'undefined'"),
        ("def double(x):\n    raise AssertionError('mine')", "error", "test 1 of 3: AssertionError: mine"),
        ("class Odd(Exception): pass\ndef double(x):\n    raise Odd('hm')", "error", "test 1 of 3: Odd: hm"),
        ("def twice(x):\n    return 2 * x", "error", "NameError: name 'double' is not defined"),
        ("def double(x:", "error", "SyntaxError"),
        ("", "error", "NameError"),
        ("x = '\0'", "error", ""),
        ("x = '\ud800'\n" + RIGHT, "error", "UnicodeEncodeError"),
        ("#" * 100_001, "refused", "100,001 characters"),
    ],
)
def test_verdicts(program, status, detail):
    verdict = one(program)
    assert verdict.status == status and detail in verdict.detail


def test_tests_that_prove_nothing_are_refused():
    assert one(RIGHT, Tests(())).status == "refused"
    assert "does not compile" in one(RIGHT, Tests(("assert double(2",))).detail


VALUES = """
import collections, enum, math
class Number(enum.IntEnum):
    ONE = 1
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def total(self): return self.a + self.b
Point = collections.namedtuple('Point', 'x y')
def same(x): return x
def total(pairs): return math.fsum(pair.total() for pair in pairs)
def count(text): return collections.Counter(text)
def naturals():
    n = 0
    while True:
        yield n
        n += 1
def fail(): raise KeyError('k')
def sum(a, b): return a + b
"""


@pytest.mark.parametrize(
    "test",
    [
        "for x in (1, -1.5, float('inf'), 2j, 10**5000, 'é\\ud800', b'\\xff', None, True, [1, (2, {3}), {4: [5]}],"
        " range(3), frozenset([1]), int): assert same(x) == x and type(same(x)) is type(x)",
        "assert same(float('nan')) != same(float('nan'))",
        "assert count('aab') == {'a': 2, 'b': 1}",
        "assert Point(1, 2) == (1, 2) and Number.ONE == 1",
        "assert total([Pair(1, 2), Pair(3, 4)]) == 10",
        "pair = Pair(1, 2)\nassert pair.a == 1 and pair.total() == 3",
        "assert Pair(1, 2) != Pair(1, 2)",
        "stream = naturals()\nassert [next(stream) for _ in range(3)] == [0, 1, 2]",
        "assert sum(1, 2) == 3",
        "try:\n    fail()\nexcept KeyError:\n    pass\nelse:\n    assert False",
        "assert collections.OrderedDict(same({1: 2})) == {1: 2}",
        "def run(candidate):\n    assert candidate([1]) == [1]\nrun(same)",
    ],
)
def test_values_go_there_and_back(test):
    assert one(VALUES, Tests((test,), entry_points=("sum",))) == Verdict("pass")


def test_the_order_is_program_setup_tests():
    tests = Tests(("assert size(root) == 2", "assert len(root.children) == 1"), "root = Node(); root.add(Node())")
    program = """
class Node:
    def __init__(self): self.children = []
    def add(self, node): self.children.append(node)
def size(node): return 1 + sum(map(size, node.children))
"""
    assert one(program, tests) == Verdict("pass")
    assert "test setup: NameError" in one("", tests).detail


def test_a_test_that_swallows_exceptions_is_no_way_out():
    tests = Tests(("try:\n    double(1)\nexcept:\n    pass",))
    assert one("import os\ndef double(x): os._exit(0)", tests).status == "error"
    assert one("def double(x):\n    while True: pass", tests).status == "timeout"


def test_python_s_own_modules_are_not_the_program_s():
    tests = Tests(("assert math.isclose(third(), 1 / 3)",))
    fake = "class math:\n    isclose = staticmethod(lambda *a: True)\ndef third(): return 5"
    patched = "import math\nmath.isclose = lambda *a: True\ndef third(): return 5"
    assert one("import math\ndef third(): return 1 / 3", tests).status == "pass"
    assert one(fake, tests).status == "wrong"
    assert one(patched, tests).status == "wrong"
    assert one("def third(): return 1 / 3", tests).status == "error"  # nobody imported it


def test_closing_stdout_harms_nobody():
    assert one("import os, sys\nsys.stdout.close()\nos.close(2)\n" + RIGHT) == Verdict("pass")


def test_output_is_kept_to_a_bound():
    verdict = one("print('hello', flush=True)\nprint('x' * 10**6)\n" + RIGHT)
    assert verdict.passed and verdict.output.startswith("hello\nxxx") and len(verdict.output) == QUICK.output


@pytest.mark.usefixtures("nothing_left")
def test_nothing_outside_can_be_read_or_written(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hidden-in-the-environment")
    (tmp_path / "secret").write_text("hidden-in-a-file")
    program = f"""
import glob, os, sys
seen = [dict(os.environ), sys.argv, os.listdir('/'), os.listdir('.'), glob.glob('/home/*'), glob.glob('/proc/*')]
for path in [{str(tmp_path / "secret")!r}, '/etc/passwd', *(f'/proc/{{pid}}/environ' for pid in ['self', *range(9)])]:
    try: seen.append(open(path).read())
    except OSError: pass
print(seen)
written = []
for folder in [{str(tmp_path)!r}, '/', '/usr/lib', '/dev', os.path.dirname(os.__file__)]:
    try: written.append(open(folder + '/written', 'w').name)
    except OSError: pass
print('WRITTEN', written)
open('here', 'w').write('x')
print(os.listdir('/tmp'))
{RIGHT}
"""
    verdict = one(program, limits=Limits(output=100_000))
    assert verdict.passed
    assert "hidden" not in verdict.output and "root:" not in verdict.output
    assert "WRITTEN []" in verdict.output and verdict.output.endswith("['here']\n")
    assert os.listdir(tmp_path) == ["secret"]


def test_programs_do_not_find_what_others_wrote():
    verdicts = check(
        ["import os\nprint(os.listdir('.'))\nopen('x', 'w').close()\n" + RIGHT] * 2,
        [TESTS] * 2,
        workers=1,
        limits=QUICK,
    )
    assert [verdict.output for verdict in verdicts] == ["[]\n", "[]\n"]


# What a program must not reach, as an expression that raises OSError or is -1 with errno set. Numbers are x86-64's.
CALL = "import ctypes, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\nlong = ctypes.c_long\n"
REFUSED = {
    "add_key": "libc.syscall(long(248), b'user', b'name', b'value', long(5), long(-4))",
    "request_key": "libc.syscall(long(249), b'user', b'name', None, long(-4))",
    "keyctl: session keyring": "libc.syscall(long(250), long(0), long(-3), long(1))",
    "keyctl: user keyring": "libc.syscall(long(250), long(0), long(-4), long(1))",
    "shared memory": "libc.shmget(0, 1 << 20, 0o1600)",
    "semaphores": "libc.semget(0, 1, 0o1600)",
    "message queue": "libc.msgget(0, 0o1600)",
    "memory file": "os.memfd_create('x')",
    "secret memory": "libc.syscall(long(447), long(0))",
    "ptrace": "libc.ptrace(0, 0, 0, 0)",
    "bpf": "libc.syscall(long(321), long(0), bytes(16), long(16))",
    "io_uring": "libc.syscall(long(425), long(1), bytes(120))",
    "performance counter": "libc.syscall(long(298), bytes(128), long(0), long(-1), long(-1), long(0))",
    "inotify": "libc.inotify_init1(0)",
    "sync": "libc.syscall(long(162))",
    "user faults": "libc.syscall(long(323), long(1))",
    "user namespace": "libc.unshare(0x10000000)",
    "mount": "libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)",
    "new mount": "libc.syscall(long(430), b'tmpfs', long(0))",
    "x32": "libc.syscall(long(0x40000000 + 39))",
    "a call of the future": "libc.syscall(long(457), 0, 0, 0, 0)",
    "vsock": "socket.socket(socket.AF_VSOCK)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "crypto": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of another machine")
@pytest.mark.parametrize("name", REFUSED)
def test_the_kernel_s_other_doors_are_shut(name):
    program = f"""{CALL}
try:
    print('reached' if ({REFUSED[name]}) != -1 else os.strerror(ctypes.get_errno()))
except OSError as error:
    print(error.strerror)
{RIGHT}
"""
    verdict = one(program)
    refusals = ("Operation not permitted", "Function not implemented", "Address family not supported by protocol")
    assert verdict.passed and verdict.output.strip() in refusals


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of another machine")
def test_programs_of_one_worker_pass_nothing_on_by_keyrings():
    keep = f"{CALL}libc.syscall(long(248), b'user', b'passed-on', b'value', long(5), long(-4))\n{RIGHT}"
    find = f"{CALL}print(libc.syscall(long(250), long(10), long(-4), b'user', b'passed-on', long(0)))\n{RIGHT}"
    verdicts = check([keep, find], [TESTS] * 2, workers=1, limits=QUICK)
    assert [verdict.output for verdict in verdicts] == ["", "-1\n"]


def test_right_programs_have_what_they_need():
    program = f"""
import asyncio, concurrent.futures, hashlib, os, socket, sqlite3, ssl, tempfile, zlib, zoneinfo
hashlib.sha256(zlib.compress(b'x')).hexdigest()
sqlite3.connect('x.db').execute('create table t (x)')
zoneinfo.ZoneInfo('Europe/Berlin')
asyncio.run(asyncio.sleep(0))
ssl.create_default_context()
a, b = socket.socketpair()
with concurrent.futures.ThreadPoolExecutor(1) as pool: pool.submit(print, 'threads').result()
if (pid := os.fork()) == 0: os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
with tempfile.TemporaryFile() as file: file.write(b'x')
{RIGHT}
"""
    assert one(program) == Verdict("pass", output="threads\n")


def test_only_python_s_library_is_there():
    program = f"""
import os, sys
found = [os.path.join(at, name) for at, folders, _ in os.walk('/') for name in folders if name.endswith('-packages')]
print(sys.orig_argv, [os.listdir(path) for path in found if os.listdir(path)])
print([path for path in ('/usr/lib/python3', '/usr/bin', '/etc', '/proc/self', {str(ROOT)!r}) if os.path.exists(path)])
{RIGHT}
"""
    verdict = one(program, limits=Limits(output=100_000))
    assert verdict.passed
    assert verdict.output == "[''] []\n[]\n"


def test_no_seccomp_no_programs(monkeypatch):
    """Also where they may run without isolation."""
    monkeypatch.setattr(code_execution, "protections", lambda: Protections(False, "because"))
    another = "import platform\nplatform.machine = lambda: 'pdp11'"
    monkeypatch.setattr(code_execution, "_START", another + code_execution._START)
    with pytest.raises(UserError, match=r"cannot be run here: .*no list of system calls for pdp11"):
        check([RIGHT], [TESTS], allow_unsafe=True)


def test_no_socket_reaches_the_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        verdict = one(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)")
        with pytest.raises(TimeoutError):
            server.accept()
    assert verdict.status == "error"


def test_without_isolation_it_refuses_unless_told(monkeypatch):
    monkeypatch.setattr(code_execution, "protections", lambda: Protections(False, "because"))
    with pytest.raises(UserError, match=r"cannot be isolated here: because\..*allow_unsafe"):
        check([RIGHT], [TESTS])


def test_it_says_what_is_on():
    assert "no network" in str(code_execution.protections())
    assert "NO protection of files" in str(Protections(False, "because"))


def test_every_program_needs_tests():
    with pytest.raises(UserError, match="2 programs for 1 sets of tests"):
        check([RIGHT] * 2, [TESTS])
    assert check([], []) == []


def test_verdicts_come_in_the_programs_order(capsys):
    programs = [
        f"import time\ntime.sleep({0.3 if n % 2 else 0})\ndef double(x): raise ValueError({n})" for n in range(8)
    ]
    verdicts = check(programs, [TESTS] * 8, workers=3)
    assert [verdict.detail[-1] for verdict in verdicts] == list("01234567")
    assert "run: program 8/8" in capsys.readouterr().err


class Other(ast.NodeTransformer):
    """Returns a pair that holds what would have been returned."""

    def visit_Return(self, node):
        value = node.value or ast.Constant(None)
        return ast.Return(ast.Tuple([value, ast.Constant("another value")], ast.Load()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_all_of_mbpp_passes_and_no_mutant_does(test_data):
    with gzip.open(test_data / "mbpp" / "mbpp.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tests = [
        Tests(
            tuple(row["test_list"] + row["challenge_test_list"]),
            row["test_setup_code"],
            tuple(re.findall(r"^def (\w+)", row["code"], re.MULTILINE)),
        )
        for row in rows
    ]
    limits = Limits(cpu_seconds=60, wall_seconds=120.0)  # one of them computes for 4 s on a quiet machine
    verdicts = check([row["code"] for row in rows], tests, limits=limits)
    failed = {row["task_id"]: verdict for row, verdict in zip(rows, verdicts, strict=True) if not verdict.passed}
    assert len(rows) == 974 and not failed
    mutants = [ast.unparse(ast.fix_missing_locations(Other().visit(ast.parse(row["code"])))) for row in rows]
    verdicts = check(mutants, tests, limits=limits)
    passed = {row["task_id"]: row["code"] for row, verdict in zip(rows, verdicts, strict=True) if verdict.passed}
    assert not passed
