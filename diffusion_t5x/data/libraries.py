"""SeqIO and TensorFlow, which take seconds to import: they are, when first needed, and tasks are registered then."""

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable

from diffusion_t5x.data.silence import silent_stderr

_waiting: list[Callable[[types.ModuleType], object]] = []


def libraries() -> tuple[types.ModuleType, types.ModuleType]:
    """SeqIO and TensorFlow, silenced and kept off the accelerators, which belong to JAX. All tasks are registered."""
    found = _imported()
    while _waiting:
        _waiting.pop(0)(found[0])
    return found


def when_needed(register: Callable[[types.ModuleType], object]) -> None:
    """Calls a function of `seqio` that registers tasks: now if SeqIO is imported, else in the first `libraries()`."""
    _waiting.append(register)
    if "seqio" in sys.modules:
        libraries()


@functools.cache
def _imported() -> tuple[types.ModuleType, types.ModuleType]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with silent_stderr():
        import seqio
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # the caller has set TensorFlow up already
            tf.config.set_visible_devices([], "GPU")
    return seqio, tf
