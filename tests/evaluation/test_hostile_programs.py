"""Programs that cheat or do harm: none passes, and right programs after them do."""

import time

import pytest
from programs import QUICK, RIGHT, TESTS, leaving_nothing, one
from variants import quick

from diffusion_t5x.evaluation.code import execution as code_execution
from diffusion_t5x.evaluation.code.execution import Limits, Protections, Verdict, check

pytestmark = pytest.mark.usefixtures("isolation")


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


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "name", quick(["daemon", "sleep", "10 GB", "closes everything and stays", "flood"], ["daemon", "flood"])
)
def test_the_open_mode_cleans_up_too(monkeypatch, name):
    monkeypatch.setattr(code_execution, "protections", lambda: Protections(False, "because"))
    program, statuses = HOSTILE[name]
    assert one("open('file', 'w').close()\n" + program, allow_unsafe=True).status in statuses
