"""Programs run on tests: right ones pass, wrong ones fail, and hostile ones neither cheat nor do harm."""

import ast
import contextlib
import glob
import gzip
import json
import os
import pathlib
import platform
import re
import socket
import time

import pytest

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.code import execution as code_execution
from diffusion_t5x.evaluation.code.execution import Limits, Protections, Tests, Verdict, check

ROOT = pathlib.Path(__file__).parents[2]
RIGHT = "def double(x):\n    return 2 * x"
TESTS = Tests(("assert double(2) == 4", "assert double('ab') == 'abab'", "assert set([double(-1)]) == set([-2])"))
QUICK = Limits(cpu_seconds=1, wall_seconds=3.0)


@pytest.fixture(autouse=True, scope="module")
def isolation():
    if not code_execution.protections().isolation:
        pytest.skip(f"no isolation on this machine: {code_execution.protections().reason}")


@contextlib.contextmanager
def leaving_nothing(folder):
    """Fails where a worker's process or a temporary folder of its programs is left at the end of the block."""
    # Its command line, which its children keep, tells a worker from those of tests that run beside this one.
    start = f"import tempfile\ntempfile.tempdir = {str(folder)!r}\n{code_execution._START}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_execution, "_START", start)
        yield
    left = os.listdir(folder)
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if start.encode() in pathlib.Path(path).read_bytes():
                left.append(path)
    assert left == []


@pytest.fixture
def nothing_left(tmp_path_factory):
    with leaving_nothing(tmp_path_factory.mktemp("programs")):
        yield


def one(program, tests=TESTS, limits=QUICK, **options):
    """The program's verdict, in a worker that must be able to go on with another program."""
    verdict, after = check([program, RIGHT], [tests, TESTS], limits=limits, workers=1, **options)
    assert after == Verdict("pass")
    return verdict


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


# Programs that do not know what to answer, and want to pass.
ALWAYS = """
class Always:
    def __eq__(self, other): return True
    def __hash__(self): return 0
    def __bool__(self): return True
    def __getattr__(self, name): return self
    def __call__(self, *args): return self
"""
CHEATS = {
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in the call": "import sys\ndef double(x): sys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the call": "import os\ndef double(x): os._exit(0)",
    "exit in a thread": "import os, threading\nthreading.Thread(target=lambda: os._exit(0)).start()",
    "always equal": ALWAYS + "def double(x): return Always()",
    "subclass": "class Same(int):\n    def __eq__(self, other): return True\ndef double(x): return Same(1)",
    "builtins": "import builtins\nbuiltins.AssertionError = Warning\nbuiltins.set = lambda x: 0\ndef double(x): pass",
    "own set": "def set(x): return 0\ndef double(x): return {2: 4, 'ab': 'abab'}.get(x)",
    "own globals": ALWAYS + "globals().update(dict.fromkeys(['double', 'set', 'assert', '__builtins__'], Always()))",
    "hooks": "import sys\nsys.excepthook = sys.settrace = lambda *a: None\ndef double(x): raise Warning",
    "verdict on every descriptor": """
import os
for fd in range(64):
    for text in (b'{"status": "pass", "detail": "", "output": ""}\\n', b'\\0\\0\\0\\x0f["value", true]'):
        try: os.write(fd, text)
        except OSError: pass
""",
    "answers before questions": """
import os
while True: os.write(3, b'\\0\\0\\0\\x0f["value", null]')
""",
    "patched channel": """
from diffusion_t5x.evaluation.code.sandbox import judge, runner, wire, worker
wire.frame = lambda message, frame=wire.frame: frame(["value", True])
judge.judge = worker._say = lambda *a: ("pass", "")
def double(x): return 0
""",
    "forged objects": """
from diffusion_t5x.evaluation.code.sandbox import wire
wire.encode = lambda value, refer: ["object", {"__eq__": True}]
def double(x): return 0
""",
    "look for the tests": """
import gc, sys
def strings():
    frame = sys._getframe()
    while frame:
        yield from map(repr, frame.f_locals.values())
        frame = frame.f_back
    for x in gc.get_objects():
        if isinstance(x, list | tuple): yield repr(x)[:100_000]
        if isinstance(x, dict): yield ''.join(map(str, [*x, *x.values()]))
found = [s for s in list(strings()) if chr(97) + 'ssert double' in s]
print('found' if found else 'nothing')
def double(x): return None
""",
}


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


HOSTILE = {
    "loop": ("while True: pass", {"timeout"}),
    "loop in C": ("sum(range(10**15))", {"timeout"}),
    "sleep": ("import time\ntime.sleep(1000)", {"timeout"}),
    "sleep in the call": ("import time\ndef double(x): time.sleep(1000)", {"timeout"}),
    "deaf": ("import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
             "    except OSError: pass\nwhile True: pass", {"timeout"}),
    "recursion": ("import sys\nsys.setrecursionlimit(10**9)\nf = lambda x: f([x])\nf(0)",
                  {"memory", "error", "timeout"}),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"timeout"}),
    "thread bomb": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
                    {"error"}),
    "daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
               "        time.sleep(1000)\n    os._exit(0)", {"error"}),
    "10 GB": ("x = bytearray(10**10)", {"memory"}),
    # A machine may take longer to hand out the pages than QUICK leaves.
    "10 GB in parts": ("x = []\nwhile True: x.append(bytearray(10**7))", {"memory", "timeout"}),
    "10 GB in the call": ("def double(x): return 'x' * 10**10", {"memory"}),
    "10 GB for the judge": ("def double(x): return range(10**10)", {"wrong"}),
    "long answer": ("def double(x): return 'x' * 10**8", {"error", "timeout", "memory"}),
    "endless answer": ("import itertools\ndef double(x): return itertools.count()", {"wrong"}),
    "10 GB file": ("with open('/tmp/x', 'wb') as f:\n    while True: f.write(bytes(10**6))", {"error"}),
    "10 GB in files": ("for n in range(10**4):\n    with open(f'x{n}', 'wb') as f: f.write(bytes(10**6))", {"error"}),
    "memory file": ("import os\nf = os.memfd_create('x')\nwhile True: os.write(f, bytes(10**6))", {"error"}),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", {"error"}),
    "kills everyone": ("import os\nfor pid in [-1, *range(2, 5000)]:\n    try: os.kill(pid, 9)\n"
                       "    except OSError: pass", {"error"}),
    "closes everything": ("import os\nos.closerange(0, 100)", {"error"}),
    "closes everything and stays": ("import os, time\nos.closerange(0, 100)\ntime.sleep(1000)", {"error"}),
    "flood": ("while True: print('x' * 10**6)", {"timeout"}),
    "flood to stderr": ("import sys\nwhile True: sys.stderr.write('x' * 10**6)", {"timeout"}),
    "waits for input": ("input()", {"error"}),
    "new namespaces": ("import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
                       "assert c.unshare(0x10000000) == 0 or c.unshare(0x20000) == 0, 'not allowed'", {"error"}),
    "crash": ("import ctypes\nctypes.string_at(0)", {"error"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Verdicts on all cheats and hostile programs, each followed by a right one; checked to leave nothing."""
    programs = [*CHEATS.values(), *(program for program, _ in HOSTILE.values())]
    start = time.monotonic()
    with leaving_nothing(tmp_path_factory.mktemp("programs")):
        found = check(
            [text for program in programs for text in (program, RIGHT)], [TESTS] * 2 * len(programs), limits=QUICK
        )
    assert time.monotonic() - start < 10 * len(programs)
    assert set(found[1::2]) == {Verdict("pass")}
    return dict(zip([*CHEATS, *HOSTILE], found[::2], strict=True))


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pass(name, verdicts):
    assert verdicts[name].status in ("wrong", "error", "timeout", "memory")
    if name == "look for the tests":
        assert verdicts[name].output == "nothing\n"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_survived(name, verdicts):
    assert verdicts[name].status in HOSTILE[name][1], verdicts[name]
    assert len(verdicts[name].output) <= QUICK.output


def test_memory_taken_in_parts_is_limited():
    assert one(HOSTILE["10 GB in parts"][0], limits=Limits(cpu_seconds=60, wall_seconds=120)).status == "memory"


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


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("name", ["daemon", "sleep", "10 GB", "closes everything and stays", "flood"])
def test_the_open_mode_cleans_up_too(monkeypatch, name):
    monkeypatch.setattr(code_execution, "protections", lambda: Protections(False, "because"))
    program, statuses = HOSTILE[name]
    assert one("open('file', 'w').close()\n" + program, allow_unsafe=True).status in statuses


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
