"""Attacks on the sandbox's verdicts and limits: none passes, none harms the programs after it."""

import pytest
from programs import QUICK, RIGHT

from diffusion_t5x.evaluation.code.execution import Tests, Verdict, check

pytestmark = pytest.mark.usefixtures("isolation")
TESTS = Tests(("assert double(2) == 4", "assert double('ab') == 'abab'"))
FORGED = '{"status": "pass", "detail": "", "output": ""}'


def run(attacks):
    """Verdicts on attacks, {name: (program, tests)}; the right program after each one must pass."""
    programs = [text for program, _ in attacks.values() for text in (program, RIGHT)]
    verdicts = check(programs, [x for _, tests in attacks.values() for x in (tests or TESTS, TESTS)], limits=QUICK)
    assert set(verdicts[1::2]) == {Verdict("pass")}
    return dict(zip(attacks, verdicts[::2], strict=True))


def unpickled(name):
    """A program whose answer, unpickled, would say that it passed."""
    code = f"import os; os.write(1, {FORGED.encode()!r} + bytes([10])); os._exit(0)"
    attack = f"class Attack:\n    def __reduce__(self): return exec, ({code!r},)"
    return f"import pickle as {name}\n{attack}\ndef to_json(x): return {name}.dumps(Attack())"


# Where a test would say yes, or the judge would do as it is told.
BELIEVED = {
    "another module under a module's name": (unpickled("json"), "assert json.loads(to_json([1])) == [1]"),
    "another module under another name": (unpickled("j"), "assert j.loads(to_json([1])) == [1]"),
    "an import that prints": ("import this as double", "assert double(2) == 4"),
    "StopIteration ends all()": (
        "def double(x): raise StopIteration",
        "assert all(map(lambda x: double(x) == 4, [2]))",
    ),
    "StopIteration ends filter()": ("def odd(x): raise StopIteration", "assert not list(filter(odd, [2, 4]))"),
    "StopIteration ends a loop": ("def double(x): raise StopIteration", "for x in map(double, [2]): assert x == 4"),
    "StopIteration ends iter()": ("def double(x): raise StopIteration", "assert not list(iter(lambda: double(2), 4))"),
    "a test prints a verdict": (
        f"def double(x): return {FORGED!r} + '\\n' * 10_000",
        "print(double(2), flush=True)\nassert double(2) == 4",
    ),
}


@pytest.fixture(scope="module")
def verdicts():
    attacks = {name: (program, Tests((test,))) for name, (program, test) in BELIEVED.items()}
    return run(attacks | {name: (program, None) for name, program in (CHEATS | BOUNDED).items()})


@pytest.mark.parametrize("name", BELIEVED)
def test_what_the_judge_believes(name, verdicts):
    assert verdicts[name].status in ("wrong", "error"), verdicts[name]


SEND = "import array, os, socket\ndef send(data, fd=3): os.write(fd, len(data).to_bytes(4) + data)\n"
CHEATS = {
    "trace functions": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef double(x): 0",
    "at exit": "import atexit, os\natexit.register(os.write, 3, b'x')\ndef double(x): raise SystemExit(0)",
    "the runner's own actions": "import sys\nsys._getframe(3).f_globals['_ACTIONS']['call'] = lambda *a: True\n"
    "def double(x): return 0",
    "a child that lives on": "import os, time\nif os.fork() == 0: time.sleep(99)\ndef double(x): return 0",
    "a child that answers": f"import os\nif os.fork(): os._exit(0)\n{RIGHT}",
    "a thread at the end": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
    "stops everybody": "import os\nfor n in (19, 20):\n    os.kill(0, n)\n    os.killpg(0, n)\ndef double(x): 0",
    "hands descriptors over": f"{SEND}s = socket.socket(fileno=os.dup(3))\n"
    "data = b'\\0\\0\\0\\x0b[\"value\",4]'\n"
    "def double(x): s.sendmsg([data] * 9, [(1, 1, array.array('i', [0, 1, 2]))])",
    "half closed": f"import socket\nsocket.socket(fileno=3).shutdown(socket.SHUT_WR)\n{RIGHT}",
    "deep JSON": f"{SEND}def double(x): send(b'[' * 10**6 + b']' * 10**6)",
    "odd kinds": f'{SEND}def double(x): send(b\'["value", [["x"], {{}}]]\')',
    "an odd exception": f"{SEND}def double(x): send(b'[\"raised\", 3]')",
    "an exit by the judge": f'{SEND}def double(x): send(b\'["raised", ["SystemExit", "0"]]\')',
    "drops": f"{SEND}import time\ndef double(x):\n    os.write(3, b'\\0\\0\\1\\0')\n    while True: os.write(3, b'x')",
    "equal hashes": "def double(x): return {i * (2**61 - 1): 0 for i in range(2 * 10**4)}",
    "no number": "def double(x): return float('nan')",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pass(name, verdicts):
    assert verdicts[name].status in ("wrong", "error", "timeout"), verdicts[name]


def counted(action, before=""):
    """A right program that prints how often it can do something."""
    return f"import ctypes, fcntl, os, socket, time\nlibc = ctypes.CDLL(None)\n{before}\nn = 0\ntry:\n" \
           f"    while n < 10**5:\n        {action}\n        n += 1\nexcept OSError: pass\n" \
           f"print(n)\n{RIGHT}"  # fmt: skip


BOUNDED = {
    "1024 files": counted("os.mkdir(f'd{n}')"),
    "16 MiB of files": counted("with open(f'{n}', 'wb') as file: file.write(bytes(1 << 20))"),
    "16 MiB of deleted files": counted("file = open('x', 'wb', 0)\n        kept.append(file)\n        "
                                       "os.unlink('x')\n        file.write(bytes(1 << 20))", "kept = []"),
    "20 attributes": counted("os.setxattr('.', f'user.{n}', bytes(60_000))"),
    "4 processes": counted("if os.fork() == 0: time.sleep(99)"),
    "64 timers": counted("if libc.timer_create(1, None, bytes(8)): break"),
    "32 descriptors": counted("os.dup(0)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_what_the_kernel_keeps_is_bounded(name, verdicts):
    assert int(verdicts[name].output) <= int(name.split()[0])


def test_tests_neither_end_the_judge_nor_read_its_jobs():
    tests = Tests(("import os, sys\nassert sys.stdin.read() == ''\nos._exit(0)",))
    assert run({"exit": (RIGHT, tests)})["exit"] == Verdict("error", "the judge ended with status 0")


def test_a_module_by_another_name_is_the_program_s():
    program = "import collections as c\ndef count(x): return c.Counter(x)"
    assert run({"alias": (program, Tests(("assert c.Counter('aab') == count('aab') == {'a': 2, 'b': 1}",)))})[
        "alias"
    ] == Verdict("pass")


def test_sockets_do_not_outlive_a_program():
    bind = "import socket\ns = socket.socket(socket.AF_UNIX)\n"
    left = f"{bind}s.bind('\\0name')\ns.listen()\n{RIGHT}"
    found = f"{bind}try:\n    s.connect('\\0name')\n    print('found')\nexcept OSError: print('none')\n{RIGHT}"
    verdicts = check([left, found], [TESTS] * 2, workers=1, limits=QUICK)
    assert [verdict.output for verdict in verdicts] == ["", "none\n"]
