"""Verbs whose settings are a dataclass: the fields are what gin binds, and the class says how the verb runs."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol


class Runs(Protocol):
    def run(self) -> None: ...


def verb(name: str, settings: Callable[..., Runs]) -> Callable[..., None]:
    """Returns a function `name(**settings)` that makes the settings and runs them: `train = verb("train", Training)`.

    It has the signature, the module and the docstring of the class, for gin files and for callers in Python.
    """

    def function(**values: Any) -> None:
        settings(**values).run()

    function.__name__ = function.__qualname__ = name
    function.__module__, function.__doc__ = settings.__module__, settings.__doc__
    function.__signature__ = inspect.signature(settings)  # type: ignore[attr-defined]
    function.__annotations__ = {**settings.__init__.__annotations__, "return": None}
    return function
