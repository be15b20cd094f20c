"""SeqIO and TensorFlow, which take seconds to import: they are, when first needed, and tasks are registered then."""

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from diffusion_t5x.data.silence import silent_stderr

# TensorFlow imports Keras, which nothing here uses, and Keras these where they are there: a third of the time.
_OF_KERAS = ("matplotlib", "pandas", "sklearn")

_waiting: list[Callable[[types.ModuleType], object]] = []


class Source(Protocol):
    """A task's source of records, as far as it can be known without SeqIO."""

    @property
    def splits(self) -> Sequence[str]: ...

    def check(self, split: str) -> None:
        """Raises a UserError for what is wrong with the records of a split, if they can be read without SeqIO."""


# Of the tasks that were declared here, by name.
sources: dict[str, Source] = {}


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
    with silent_stderr(), _without(*_OF_KERAS):
        import seqio
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # the caller has set TensorFlow up already
            tf.config.set_visible_devices([], "GPU")
    return seqio, tf


@contextlib.contextmanager
def _without(*modules: str) -> Iterator[None]:
    """Lets imports continue as if these modules, where nothing has imported them yet, were not installed."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is how Python marks them
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
