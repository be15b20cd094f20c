"""Calls of the verbs by the comparisons of routes."""

import shlex
from collections.abc import Callable

from diffusion_t5x.command_line import config


def run(verb: Callable[..., None], flags: list[str]) -> None:
    """Runs a verb in this process, and prints the command that would do the same."""
    print("python -m", verb.__module__, shlex.join(flags), flush=True)
    config.run(verb, flags)


def settings(**values: object) -> list[str]:
    """Returns the flags that set macros."""
    return [f"--gin.{name}={value}" for name, value in values.items()]
