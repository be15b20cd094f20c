"""Handles stop signals from a scheduler (SIGTERM, SIGUSR1), a closed terminal (SIGHUP) or a user (SIGINT, Ctrl-C)."""

import contextlib
import logging
import os
import signal
import stat
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self, TypeVar

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h, "try again": neither success nor what a crash or an unhandled signal gives (1, 143, 137).
RUN_AGAIN = 75
# What a shell gives for SIGINT: a person stopped the run, and no launcher should start it again.
STOPPED = 128 + signal.SIGINT

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# A second one of these ends at once. The others may come along with them, or twice, without anybody's wish.
_URGENT = (signal.SIGTERM, signal.SIGINT)

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class _BrokenOff(BaseException):
    """Raised by a signal to interrupt `StopSignals.attempt`."""


class StopSignals:
    """Context that notes the first of SIGNALS; a second SIGTERM or SIGINT ends the process at once.

    "At once" applies even while the main thread computes or compiles: another thread does it. An ignored SIGHUP, as
    under `nohup`, stays ignored. If JAX joins several processes, its preemption service handles SIGTERM and is passed
    the other signals, except SIGINT, which is unchanged: a notice to any process stops all at the same step.
    """

    def __init__(self):
        self._number: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._may_break_off = False
        self._joined = jax.distributed.is_initialized()

    def __enter__(self) -> Self:
        handled = [n for n in SIGNALS if n not in _URGENT and signal.getsignal(n) is not signal.SIG_IGN]
        if self._joined:
            self._before = {number: signal.signal(number, _hand_on) for number in handled}
            return self
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read_end,), daemon=True, name="stop_signals").start()
        self._before = {number: signal.signal(number, self._note) for number in (*_URGENT, *handled)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._joined:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)

    @property
    def exit_code(self) -> int:
        """The exit code of a process that was told to stop and has saved."""
        return STOPPED if self._number == signal.SIGINT else RUN_AGAIN

    def reached(self, step: int) -> bool:
        """True if the run stops after this step. Every process must call it at every step."""
        if self._joined:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._number is not None

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """Runs long work that can be repeated. Returns None if a first signal interrupts it."""
        try:
            try:
                self._may_break_off = True
                return work() if self._number is None else None
            finally:
                self._may_break_off = False
        except _BrokenOff:
            return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if self._may_break_off:
            self._may_break_off = False
            raise _BrokenOff

    def _watch(self, read_end: int) -> None:
        """Acts on signals as they come through the pipe; Python runs `_note` only when the main thread is free."""
        with open(read_end, "rb", buffering=0) as pipe:
            noted = urgent = False
            while number := pipe.read(1):
                if number[0] not in self._before:
                    continue
                if number[0] in _URGENT and urgent:
                    os._exit(128 + number[0])
                urgent = urgent or number[0] in _URGENT
                if number[0] == signal.SIGHUP:
                    _leave_terminal()
                if not noted:
                    name = signal.Signals(number[0]).name
                    logger.warning("%s: stopping after this step with a checkpoint. A second signal ends at once", name)
                noted = True


def _hand_on(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_terminal() -> None:
    """Redirects output for a closed terminal to nowhere: writing there would be an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # `isatty` no longer knows a terminal that has closed
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
