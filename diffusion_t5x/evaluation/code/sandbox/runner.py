"""The program's own process: runs its source and serves the judge's requests.

Nothing here is trusted once the program's source has run, which may change any of it.
"""

import contextlib
import os
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from diffusion_t5x.evaluation.code.sandbox import isolation, system_calls, wire

_MAX_MESSAGE = 300  # characters of an exception's message


def run(channel: int, output: int, folder: str, limits: Mapping[str, int]) -> NoReturn:
    """Serves the judge until it hangs up; never returns.

    Args:
      channel: file descriptor of the socket to the judge.
      output: file descriptor of the pipe for standard output and standard error.
      folder: working folder.
      limits: see `isolation.confine`.
    """
    isolation.die_with_parent()
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    channel = os.dup2(channel, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    os.chdir(folder)
    isolation.confine(limits)
    system_calls.refuse()

    sys.argv, sys.orig_argv = [""], [""]
    program = types.ModuleType("program")
    sys.modules["program"] = program  # where dataclasses and pickle look for it
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def do(action: str, *arguments: Any) -> Any:
        return _ACTIONS[action](program, *(wire.decode(argument, objects.__getitem__) for argument in arguments))

    try:
        while True:
            request = wire.read_frame(lambda size: wire.read_exactly(channel, size))
            try:
                reply = wire.frame(["value", wire.encode(do(*request), refer)])
            except BaseException as error:
                reply = wire.frame(["raised", [type(error).__name__, str(error)[:_MAX_MESSAGE]]])
            with contextlib.suppress(Exception):  # it may be closed
                sys.stdout.flush()
            while reply:
                reply = reply[os.write(channel, reply) :]
    finally:
        os._exit(1)


def _run(program: types.ModuleType, source: str) -> None:
    exec(compile(source, "<program>", "exec"), program.__dict__)


def _look_up(program: types.ModuleType, name: str) -> Any:
    try:
        return program.__dict__[name]
    except KeyError:
        raise NameError(f"name {name!r} is not defined") from None


_ACTIONS: dict[str, Callable[..., Any]] = {
    "run": _run,
    "look up": _look_up,
    "call": lambda program, function, arguments, named: function(*arguments, **named),
    "attribute": lambda program, value, name: getattr(value, name),
    "iterate": lambda program, value: iter(value),
    "next": lambda program, value: next(value),
}
