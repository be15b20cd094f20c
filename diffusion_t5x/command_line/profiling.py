"""Traces a part of a run with JAX's profiler, for xprof: what the host and the devices did."""

import argparse
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator

from diffusion_t5x.command_line import processes
from diffusion_t5x.errors import UserError

logger = logging.getLogger(__name__)


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds `--profile` and `--profile_seconds`."""
    add = parser.add_argument
    add(
        "--profile",
        metavar="DIR",
        help="write a trace of JAX's profiler here; xprof --logdir DIR shows it",
    )
    add(
        "--profile_seconds",
        type=_seconds,
        default=(0.0, 60.0),
        metavar="FROM:TO",
        help="with --profile: trace this part, in seconds from the start (default: 0:60)",
    )


def _seconds(text: str) -> tuple[float, float]:
    try:
        first, last = map(float, text.split(":"))
    except ValueError:
        first, last = 0.0, 0.0
    if not 0 <= first < last <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO, two times in seconds such as 60:70")
    return first, last


@contextlib.contextmanager
def profiled(folder: str | None, seconds: tuple[float, float]) -> Iterator[None]:
    """Context of a run of which `seconds` (from, to) are traced; of several processes, the first is. None: no trace.

    Raises:
      UserError: the folder cannot be written.
    """
    if folder is None or not processes.is_first():
        yield
        return
    _make(folder)
    import jax  # some verbs need it only here

    first, last = seconds
    ended, begun = threading.Event(), time.monotonic()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call in Python is noted otherwise, which slows a run down

    def trace() -> None:
        if first:
            if ended.wait(first):
                return
            jax.profiler.start_trace(folder, profiler_options=options)
        ended.wait(last - first)
        jax.profiler.stop_trace()
        logger.info("profile in %s: pip install xprof; xprof --logdir %s", folder, folder)

    if not first:
        jax.profiler.start_trace(folder, profiler_options=options)  # which takes a while
    tracer = threading.Thread(target=trace, name="profiler")
    tracer.start()
    try:
        yield
    finally:
        ended.set()
        tracer.join()
        if (ran := time.monotonic() - begun) < first:
            logger.warning("no profile: the run ended after %.0f s; --profile_seconds begins at %g", ran, first)


def _make(folder: str) -> None:
    if "://" in folder:
        raise UserError(f"--profile={folder}: the profiler writes to local folders only.")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile={folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--profile={folder} cannot be written.")
