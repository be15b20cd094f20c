"""A process that forks judges, one for each program, and cleans up after them.

It never reads a job itself: each judge starts the program's process first and waits for a job then. So no process that
runs a program was ever forked from one that knew a test.

Reads frames (`wire`): jobs, from standard input. Writes JSON lines to standard output: one when it is ready, then a
verdict for each job. Ends with its input.
"""

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn, TextIO

from diffusion_t5x.evaluation.code.sandbox import isolation, judge, runner, system_calls, wire

UNSHARED = "unshared"  # the first line of an isolated worker: its id maps are to be written now
_DONE, _OUT_OF_JOBS, _BROKEN = 9, 10, 11  # exit statuses of a judge; a test could end it with 0


def main(isolated: bool, limits: Mapping[str, Any]) -> None:
    """Serves until the end of its input.

    Args:
      isolated: run in separate namespaces. Without them, programs see the machine's files, network and processes.
      limits: `Limits` of the library, by name.
    """
    sys.set_int_max_str_digits(0)  # long numbers are plain data
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    isolation.adopt_orphans()
    children = os.open(f"/proc/{os.getpid()}/task/{os.getpid()}/children", os.O_RDONLY)
    try:
        system_calls.check()
        if isolated:
            isolation.enter_namespaces(_wait_for_id_maps)
    except OSError as error:
        _say({"failed": str(error)})
        return
    _say({"failed": None})
    exit_status = _DONE
    while exit_status not in (_OUT_OF_JOBS, _BROKEN):
        folder = isolation.SCRATCH if isolated else tempfile.mkdtemp(prefix="program-")
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(children)
            _judge_one(isolated, limits, folder)
        try:
            _, status = os.waitpid(pid, 0)
        finally:
            _kill_all(children)
            if not isolated:
                shutil.rmtree(folder, ignore_errors=True)
        exit_status = os.waitstatus_to_exitcode(status)
        if exit_status == -signal.SIGALRM:
            _say({"status": "timeout", "detail": "a test took too long", "output": ""})
        elif exit_status not in (_DONE, _OUT_OF_JOBS, _BROKEN):
            end = f"by signal {-exit_status}" if exit_status < 0 else f"with status {exit_status}"
            _say({"status": "error", "detail": f"the judge ended {end}", "output": ""})


def _wait_for_id_maps() -> None:
    _say(UNSHARED)
    wire.read_exactly(0, 1)


def _judge_one(isolated: bool, limits: Mapping[str, Any], folder: str) -> NoReturn:
    exit_status, errors = _BROKEN, sys.stderr
    try:
        isolation.die_with_parent()
        if isolated:
            isolation.enter_job(limits["disk"])
        # What a program returns may be long, or make a test ask for much.
        resource.setrlimit(resource.RLIMIT_AS, (2 * limits["memory"],) * 2)
        mine, its = socket.socketpair()
        output, its_output = os.pipe()
        pid = os.fork()
        if pid == 0:
            runner.run(its.fileno(), its_output, folder, limits)
        its.close()
        os.close(its_output)
        try:
            job = wire.read_frame(lambda size: wire.read_exactly(0, size))
        except EOFError:
            os._exit(_OUT_OF_JOBS)
        verdicts, errors = _leave_standard_streams()
        program = judge.Program(mine, output, limits["output"], limits["wall_seconds"])
        try:
            status, detail = judge.judge(job, program, limits["wall_seconds"])
        except EOFError:
            status, detail = _end_of(pid, limits["cpu_seconds"])
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        program.drain()
        _say({"status": status, "detail": detail, "output": program.printed}, verdicts)
        exit_status = _DONE
    except BaseException:
        traceback.print_exc(file=errors)
        errors.flush()
    finally:
        os._exit(exit_status)


def _leave_standard_streams() -> tuple[int, TextIO]:
    """Copies of standard output and error; what tests print, maybe of a program's values, goes nowhere from now on.

    It would be read as a verdict, or obeyed by the caller's terminal. Nor do tests read the next job.
    """
    verdicts, errors = os.dup(1), os.fdopen(os.dup(2), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    return verdicts, errors


def _end_of(pid: int, cpu_seconds: int) -> tuple[str, str]:
    """Returns the verdict on a process that has hung up."""
    exited = select.select([os.pidfd_open(pid)], [], [], 0.5)[0]
    if not exited:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    if not exited:
        return "error", "hung up before all tests were run"
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL and usage.ru_utime + usage.ru_stime > cpu_seconds - 0.5:
        return "timeout", f"{cpu_seconds} s of processor time are used up"
    return "error", f"ended {f'by signal {-code}' if code < 0 else f'with status {code}'} before all tests were run"


def _kill_all(children: int) -> None:
    """Kills every descendant; orphans become children of this process, until there is none."""
    while True:
        for pid in os.pread(children, 1 << 16, 0).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _say(message: Any, stream: int = 1) -> None:
    os.write(stream, json.dumps(message).encode("ascii") + b"\n")
