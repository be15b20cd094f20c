"""Programs to be judged, and what a sandbox must not leave behind."""

import contextlib
import glob
import pathlib
import tempfile

from diffusion_t5x.evaluation.code.execution import Limits, Tests, Verdict, check

RIGHT = "def double(x):\n    return 2 * x"
TESTS = Tests(("assert double(2) == 4", "assert double('ab') == 'abab'", "assert set([double(-1)]) == set([-2])"))
QUICK = Limits(cpu_seconds=1, wall_seconds=3.0)


def leftovers():
    """Worker processes and temporary folders of theirs."""
    found = set(glob.glob(f"{tempfile.gettempdir()}/program-*"))
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if b"from diffusion_t5x.evaluation.code.sandbox import worker" in pathlib.Path(path).read_bytes():
                found.add(path)
    return found


def one(program, tests=TESTS, limits=QUICK, **options):
    """The program's verdict, in a worker that must be able to go on with another program."""
    verdict, after = check([program, RIGHT], [tests, TESTS], limits=limits, workers=1, **options)
    assert after == Verdict("pass")
    return verdict
