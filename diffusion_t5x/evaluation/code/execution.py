"""Runs model-written programs on tests: isolated, limited, and judged from outside.

    verdicts = check(["def double(x): return 2 * x"], [Tests(("assert double(2) == 4",))])

A program is untrusted text. Each one runs in a process of its own that sees Python's standard library, the shared
libraries that it needs and an empty folder in memory, and nothing else: no other files, no environment, no network, no
other processes, no keyrings. When it ends, everything it started is killed and the folder is gone.

The tests run in another process, which only asks the program for values (`sandbox.judge`). To pass, a program must give
right answers to all tests, however it finds them. It sees the arguments of each call, but neither the tests nor the
values that they expect, so nothing that it changes in its own interpreter can make it pass. The price: tests can pass
and receive only plain data (numbers, text, lists, tuples, sets, dictionaries, ...) and the program's own objects, which
equal only themselves; if a program changes an argument in place, the test does not see it.

Not prevented: kernel vulnerabilities; a program that wastes time up to its limits on purpose; and everything that
`allow_unsafe` permits.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.code.sandbox import isolation, wire, worker
from diffusion_t5x.progress import Progress

logger = logging.getLogger(__name__)

Status = Literal["pass", "wrong", "error", "timeout", "memory", "refused"]
MAX_SOURCE = 100_000  # characters of a program

_ROOT = str(pathlib.Path(__file__).resolve().parents[3])
_START = """
import json, sys
sys.path.insert(0, sys.argv[1])
from diffusion_t5x.evaluation.code.sandbox import worker
sys.path.pop(0)
worker.main(sys.argv[2] == "isolated", json.loads(sys.argv[3]))
"""
_ENVIRONMENT = {"HOME": isolation.SCRATCH, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}  # all that a program sees


@dataclasses.dataclass(frozen=True)
class Tests:
    """Tests of one program.

    Attributes:
      asserts: source texts, run one after another in one namespace; each raises AssertionError if it fails. A name that
        they use and do not define is the program's.
      setup: source that runs after the program, in its namespace and process.
      entry_points: names defined by the program that Python also has, as a built-in (`sum`) or a standard module. In
        tests, all other such names mean Python's own.
    """

    __test__ = False  # no class of tests for pytest

    asserts: tuple[str, ...]
    setup: str = ""
    entry_points: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Resource limits of a program.

    Attributes:
      cpu_seconds: CPU time of each process.
      wall_seconds: time from its start to the last test.
      memory: bytes of address space of each process; shared memory and files in memory, which belong to no process, are
        refused.
      disk: bytes in its folder, and in a file.
      processes: number of processes and threads at a time.
      output: bytes of printed text to keep.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 20.0
    memory: int = 512 << 20
    disk: int = 16 << 20
    processes: int = 4
    output: int = 4096


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Result of a program's tests.

    Attributes:
      status: "pass": every test ran and passed. "wrong": a test failed. "error": an exception, or the process
        ended. "timeout" and "memory": a limit. "refused": not run at all.
      detail: the test, and what happened.
      output: the beginning of the program's output.
    """

    status: Status
    detail: str = ""
    output: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "pass"


@dataclasses.dataclass(frozen=True)
class Protections:
    """The isolation that this machine can give programs.

    Attributes:
      isolation: namespaces for users, files, network, processes and IPC. Essential.
      reason: the reason if there is none.
    """

    isolation: bool
    reason: str = ""

    def __str__(self) -> str:
        limits = "limits on time, memory, files, processes and system calls; all processes killed; clean environment"
        if self.isolation:
            return f"{limits}; no files but an empty folder, no network, no view of other processes, no privileges"
        return f"{limits}; NO protection of files, network and other processes ({self.reason})"


@functools.cache
def protections() -> Protections:
    """Finds out, once, which isolation this machine allows.

    Raises:
      UserError: the machine does not run Linux.
    """
    if sys.platform != "linux":
        raise UserError(f"Programs can be run safely only on Linux, not on {sys.platform}.")
    try:
        with _Worker(Limits(), isolated=True) as trial:
            verdict = trial.judge("def answer(): return 42", Tests(("assert answer() == 42",)))
    except OSError as error:
        return Protections(False, str(error))
    return Protections(verdict.passed, verdict.detail)


def check_isolation(allow_unsafe: bool = False) -> Protections:
    """Returns this machine's `protections`; raises a UserError if it has no isolation and that is not allowed."""
    found = protections()
    if not found.isolation and not allow_unsafe:
        raise UserError(
            f"Programs cannot be isolated here: {found.reason}. The kernel must allow unprivileged user namespaces "
            "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns). Containers forbid them "
            "by default: score programs on the host or in a virtual machine. On a dedicated machine, set "
            "allow_unsafe."
        )
    return found


def check(
    programs: Sequence[str],
    tests: Sequence[Tests],
    *,
    limits: Limits = Limits(),
    workers: int | None = None,
    allow_unsafe: bool = False,
    quiet: bool = False,
) -> list[Verdict]:
    """Runs each program on its tests.

    Args:
      programs: source texts.
      tests: tests for each program.
      limits: limits of each program.
      workers: number of programs at a time; one per processor by default.
      allow_unsafe: run programs even if the machine allows no isolation: they can then read and write whatever you can.
      quiet: show no progress.

    Returns:
      A verdict for each program.

    Raises:
      UserError: the numbers of tests and programs differ, this machine has no isolation, or no worker starts.
    """
    if len(programs) != len(tests):
        raise UserError(f"There are {len(programs)} programs for {len(tests)} sets of tests.")
    found = check_isolation(allow_unsafe)
    logger.log(logging.DEBUG if quiet else logging.INFO, "running %d programs: %s", len(programs), found)
    workers = min(workers or os.cpu_count() or 1, max(len(programs), 1))
    verdicts = [Verdict("refused")] * len(programs)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(programs)):
        todo.put(index)

    with Progress(len(programs), description="run", unit="program", shown=not quiet) as progress:
        done = iter(range(1, len(programs) + 1))

        def work() -> None:
            with contextlib.ExitStack() as stack:
                process = stack.enter_context(_Worker(limits, found.isolation))
                with contextlib.suppress(queue.Empty):
                    while True:
                        index = todo.get_nowait()
                        try:
                            verdicts[index] = process.judge(programs[index], tests[index])
                        except OSError as error:
                            verdicts[index] = Verdict("error", f"the sandbox broke: {error}")
                            stack.close()
                            process = stack.enter_context(_Worker(limits, found.isolation))
                        progress.update(next(done))

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            try:
                for future in [pool.submit(work) for _ in range(workers)]:
                    future.result()
            except OSError as error:
                raise UserError(f"Programs cannot be run here: {error}.") from error
            finally:  # interrupted: let none be begun
                with contextlib.suppress(queue.Empty):
                    while True:
                        todo.get_nowait()
    return verdicts


class _Worker:
    """A worker process (`sandbox.worker`) and the connection to it.

    Raises:
      OSError: it does not start, or it ended.
    """

    def __init__(self, limits: Limits, isolated: bool):
        mode = "isolated" if isolated else "open"
        # -S and -s: no site-packages, which programs could not read anyway. -P: nor the current folder.
        command = [sys.executable, "-S", "-s", "-P", "-B", "-c", _START, _ROOT, mode]
        self._limits = limits
        self._process = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        try:
            started = self._read()
            if started == worker.UNSHARED:
                isolation.write_id_maps(self._process.pid)
                self._write(b"\n")
                started = self._read()
            if started["failed"]:
                raise OSError(started["failed"])
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def judge(self, source: str, tests: Tests) -> Verdict:
        """Returns the verdict on one program."""
        if len(source) > MAX_SOURCE:
            return Verdict("refused", f"{len(source):,} characters are more than {MAX_SOURCE:,}")
        try:
            job = wire.frame({"source": source, **dataclasses.asdict(tests)})
        except wire.TooLong as error:
            return Verdict("refused", f"the tests: {error}")
        self._write(job)
        return Verdict(**self._read())

    def _write(self, content: bytes) -> None:
        self._input.write(content)
        self._input.flush()

    def _read(self) -> Any:
        line = self._output.readline()
        if not line:
            raise OSError(f"the worker ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind:
            self._process.terminate()  # it kills what it has started
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._process.wait()
        self._output.close()
