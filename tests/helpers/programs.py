"""Programs to be judged, and what a sandbox must not leave behind."""

import contextlib
import glob
import os
import pathlib

import pytest

from diffusion_t5x.evaluation.code import execution as code_execution
from diffusion_t5x.evaluation.code.execution import Limits, Tests, Verdict, check

RIGHT = "def double(x):\n    return 2 * x"
TESTS = Tests(("assert double(2) == 4", "assert double('ab') == 'abab'", "assert set([double(-1)]) == set([-2])"))
QUICK = Limits(cpu_seconds=1, wall_seconds=3.0)


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


def one(program, tests=TESTS, limits=QUICK, **options):
    """The program's verdict, in a worker that must be able to go on with another program."""
    verdict, after = check([program, RIGHT], [tests, TESTS], limits=limits, workers=1, **options)
    assert after == Verdict("pass")
    return verdict
