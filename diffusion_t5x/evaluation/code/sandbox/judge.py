"""Runs tests on a program in another process and returns the verdict.

Test code and the values it expects never enter the program's process. It receives only calls with their arguments and
returns values as plain data. So a program can pass only by answering right: it has no test result to forge and no
`assert` to replace, and an object whose `__eq__` always says yes stays on its own side.
"""

import ast
import builtins
import importlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_t5x.evaluation.code.sandbox import wire

_KILL_GRACE = 5.0  # seconds after the deadline; then the judge itself, busy with a test, is killed


class ProgramError(Exception):
    """Raised if the program raised an exception that is not built in."""


class Remote:
    """An object in the program's process: it can be called, iterated, asked for attributes and passed back."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: "Program", number: int):
        self._program, self._number = program, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("attribute", self, name)

    def __iter__(self) -> Any:
        return self._program.ask("iterate", self)

    def __next__(self) -> Any:
        return self._program.ask("next", self)


class Program:
    """The judge's end of the conversation with the program's process.

    Args:
      channel: the socket to it.
      output: file descriptor of the pipe with its output.
      max_output: number of characters of the output to keep.
      seconds: time limit.
    """

    def __init__(self, channel: socket.socket, output: int, max_output: int, seconds: float):
        self._channel = channel
        self._output = output
        self._max_output = max_output
        self._deadline = time.monotonic() + seconds
        self._printed = b""
        self.raised: BaseException | None = None  # the last exception that came from there

    def ask(self, action: str, *arguments: Any) -> Any:
        """Sends a request to the program's process (see `runner`) and returns the result.

        Raises:
          TimeoutError: the deadline has passed.
          EOFError: the process has hung up.
          TypeError: an argument cannot be passed.
          Exception: the program's exception: built-in ones unchanged, others as `ProgramError`.
        """
        try:
            self._channel.sendall(wire.frame([action, *(wire.encode(argument, _number) for argument in arguments)]))
        except ConnectionError:
            raise EOFError from None
        kind, content = wire.read_frame(self._read)
        if kind == "raised":
            self.raised = _exception(*content)
            if isinstance(self.raised, StopIteration) and action != "next":
                # In a test such as `all(map(...))` it would end the iteration, and the test would hold.
                self.raised = RuntimeError("the program raised StopIteration")
            raise self.raised
        return wire.decode(content, lambda number: Remote(self, number))

    @property
    def printed(self) -> str:
        """The beginning of its standard output and standard error."""
        return self._printed.decode("utf-8", "replace")

    def drain(self) -> None:
        """Reads all output that has not been read yet."""
        while select.select([self._output], [], [], 0)[0] and (part := os.read(self._output, 1 << 16)):
            self._keep(part)

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            left = self._deadline - time.monotonic()
            ends: list[Any] = [self._channel, self._output]
            ready = select.select(ends, [], [], left)[0] if left > 0 else []
            if not ready:
                raise TimeoutError
            if self._output in ready:
                self._keep(os.read(self._output, 1 << 16))
            if self._channel in ready:
                try:
                    part = self._channel.recv(size)
                except ConnectionError:
                    part = b""
                if not part:
                    raise EOFError
                parts.append(part)
                size -= len(part)
        return b"".join(parts)

    def _keep(self, part: bytes) -> None:
        self._printed += part[: self._max_output - len(self._printed)]


def judge(job: Mapping[str, Any], program: Program, seconds: float) -> tuple[str, str]:
    """Returns the verdict on one program: status and short detail. The caller judges programs that hang up (EOFError).

    Args:
      job: "source", and "setup", "asserts", "entry_points" as in the library's `Tests`.
      program: its process, which has run nothing yet.
      seconds: its time limit.
    """
    place = ""
    try:
        tests = [compile(test, f"<test {n}>", "exec") for n, test in enumerate(job["asserts"], 1)]
        names = _names(job["asserts"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "refused", f"a test does not compile: {error}"
    if not tests:
        return "refused", "there are no tests to pass"
    # Ends this process, whatever it is doing, even within one long operation.
    signal.setitimer(signal.ITIMER_REAL, seconds + _KILL_GRACE)
    try:
        program.ask("run", job["source"])
        place = "test setup: "
        program.ask("run", job["setup"])
        namespace = {"__name__": "tests"} | _defined(program, names, job["entry_points"])
        for number, test in enumerate(tests, 1):
            place = f"test {number} of {len(tests)}: "
            exec(test, namespace)
        place = ""
        program.ask("run", "")  # a test that swallows every exception swallows the program's end too
    except EOFError:
        raise
    except TimeoutError:
        return "timeout", f"{place}{seconds:g} s have passed"
    except MemoryError as error:
        return "memory", f"{place}{error or 'out of memory'}"
    except AssertionError as error:
        if error is not program.raised:
            return "wrong", f"{place}{job['asserts'][number - 1].strip()[:200]}"
        return "error", f"{place}AssertionError: {error}"
    except BaseException as error:
        name = "" if isinstance(error, ProgramError) else f"{type(error).__name__}: "
        return "error", f"{place}{name}{error}"
    return "pass", ""


def _names(tests: Iterable[str]) -> set[str]:
    return {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}


def _defined(program: Program, names: Iterable[str], entry_points: Iterable[str]) -> dict[str, Any]:
    """Values that the tests read from the program under test.

    Python's own names stay Python's: a program's `set` or `math` could make any comparison hold. The name decides, not
    what the program has under it: with `pickle` in place of `json`, a test would unpickle what the program wrote.
    """
    found = {}
    for name in names:
        if name.startswith("__") or (hasattr(builtins, name) and name not in entry_points):
            continue
        try:
            value = program.ask("look up", name)
        except NameError:
            continue
        is_python_s = name in sys.stdlib_module_names and name not in entry_points
        found[name] = importlib.import_module(name) if is_python_s else value
    return found


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a test hands over a {type(value).__name__}: only plain data and the program's own objects can be")


def _exception(name: str, message: str) -> Exception:
    kind: Any = getattr(builtins, str(name), None)
    try:
        if issubclass(kind, Exception) and kind is not EOFError and kind is not TimeoutError:
            return kind(str(message))
    except TypeError:  # no class, or one that wants other arguments
        pass
    return ProgramError(f"{name}: {message}")
