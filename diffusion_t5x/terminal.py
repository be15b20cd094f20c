"""Makes text safe for a terminal, and standard streams safe for any text.

Model outputs, metadata, file names and contents, and messages that quote them may contain control characters: a
terminal would move its cursor, change its title or type into the command line.
"""

import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import NoReturn

_KEPT = "\n\t\u200c\u200d"  # the last two join letters of Persian and Hindi, and emoji; no terminal obeys them
_STRICT = "utf-8", "strict"
_READER_IS_GONE = 141  # what a shell reports of a process that SIGPIPE ended


def signs(text: str) -> str:
    """Returns the text with a sign, or angle brackets, for each unprintable character."""
    return "".join(map(_sign, text))


def safe(text: object) -> str:
    """Returns the text with `signs` for everything that a terminal might obey; lines, tabs and spaces stay.

    That is: control characters (escapes, C1, carriage returns), characters that change the writing direction, line and
    paragraph separators, and bytes that are not text.
    """
    return "".join(x if x in _KEPT or unicodedata.category(x) == "Zs" else _sign(x) for x in str(text))


def _sign(character: str) -> str:
    code = ord(character)
    if character.isprintable():
        return character
    if code < 0x20 or code == 0x7F:
        return "␡" if code == 0x7F else chr(0x2400 + code)
    # Bytes that are no character come as surrogates.
    return f"<0x{code - 0xDC00:02X}>" if 0xDC80 <= code <= 0xDCFF else f"<U+{code:04X}>"


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Makes standard streams take any text; terminals keep their encoding, files and pipes are UTF-8 in any locale.

    Characters that an encoding lacks are written as escapes such as `\\xe9`. If the reader of standard output goes
    away, as `head` does, the process ends quietly; other failures of standard output end it with one line and status 1.
    Messages that cannot be written are dropped and the run continues: it outlives its terminal. A closed stream is
    empty.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
    # Others, such as those of a test that captures them, stay.
    stdin, stdout, stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    if stdin and sys.stdin is stdin and not stdin.isatty() and (stdin.encoding, stdin.errors) != _STRICT:
        stdin.reconfigure(encoding=_STRICT[0], errors=_STRICT[1])
    if stdout and sys.stdout is stdout:
        sys.stdout = _Output(stdout)
    if stderr and sys.stderr is stderr:
        sys.stderr = _Messages(stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdin, sys.stdout, sys.stderr = before


class _Stream(io.TextIOWrapper):
    """Replaces a stream on the same file descriptor; failures go to `failed`."""

    def __init__(self, stream: io.TextIOWrapper):
        stream.flush()
        super().__init__(
            open(stream.fileno(), "wb", closefd=False),  # noqa: SIM115
            encoding=stream.encoding if stream.isatty() else "utf-8",
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.failed(error)

    def failed(self, error: OSError) -> None:
        # What is still in buffers goes nowhere, or the end of the process would fail at it again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class _Messages(_Stream):
    """Standard error that ignores failures."""


class _Output(_Stream):
    """Standard output that ends the process if it cannot be written."""

    def failed(self, error: OSError) -> NoReturn:
        super().failed(error)
        if isinstance(error, BrokenPipeError):
            sys.exit(_READER_IS_GONE)
        print(f"error: standard output cannot be written: {error.strerror}.", file=sys.stderr)
        sys.exit(1)
