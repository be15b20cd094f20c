"""User text files: finds, opens, unpacks and splits them, for all readers.

A file is plain or gzip; its text is UTF-8, with or without a byte order mark; its lines end in LF or CR LF. Plain files
are read in place, with an index of 16 bytes a piece in memory. The text of gzip files is held in memory.
"""

import abc
import collections
import glob
import gzip
import json
import logging
import mmap
import os
import re
import stat
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from diffusion_t5x import json_lines
from diffusion_t5x.errors import UserError

logger = logging.getLogger(__name__)
Path = str | os.PathLike[str]
Patterns = str | Sequence[str]
T = TypeVar("T")

# Each pattern consumes what it has looked at, blank lines too: the time is linear in the file. Group 1 is a piece.
_BLANK_LINES = rb"(?:[^\S\n]*+\n)*+"
LINE = re.compile(_BLANK_LINES + rb"(?:([^\S\n]*+\S[^\n]*+)|[^\S\n]*+\Z)")
ANY_LINE = re.compile(rb"([^\n]*+\n|[^\n]++)")
PARAGRAPHS = re.compile(_BLANK_LINES + rb"(?:([^\S\n]*+\S[^\n]*+(?:\n(?![ \t\r]*+(?:\n|\Z))[^\n]*+)*+)|[^\S\n]*+\Z)")
WHOLE = re.compile(rb"(?s)(?=\s*+\S)(.++)|\s++")

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_BLOCK = 1 << 20
# A gzip file may unpack to this multiple of its size, or to this many bytes: text rarely shrinks below a tenth.
_MOST_TIMES, _ALWAYS_FINE = 50, 1 << 28


def by_split(files: Any, name: str = "FILES") -> Mapping[str, Patterns]:
    """Returns `files` if it names files for each split.

    Raises:
      UserError: it does not.
    """
    if not isinstance(files, Mapping) or not files:
        raise UserError(f'{name} names the files of each split, as in {{"train": "my/*.jsonl"}}; it is {files!r}.')
    for split, patterns in files.items():
        listed = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(listed, list | tuple) or not listed or not all(isinstance(x, str) and x for x in listed):
            raise UserError(f"{name} takes a path or a list of paths for the split {split!r}, not {patterns!r}.")
    return files


def expand(patterns: Patterns) -> list[str]:
    """Returns the files of paths and glob patterns (`**` for folders of any depth); those of a pattern sorted.

    A path that exists is taken as it is, whatever characters it has.

    Raises:
      UserError: a path or pattern names no file, or a folder.
    """
    files: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = os.path.expanduser(pattern)
        if os.path.isdir(path):
            raise UserError(f"{pattern} is a folder: name the files in it, such as {os.path.join(pattern, '*')}.")
        if os.path.lexists(path):
            files.append(path)
            continue
        matches = sorted(glob.glob(path, recursive=True))
        found = [match for match in matches if not os.path.isdir(match)]
        if not found:
            raise UserError(f"There is no file {pattern}{', only folders' if matches else ''}.")
        if len(found) < len(matches):
            logger.warning("%s: %d folders are left out", pattern, len(matches) - len(found))
        files += found
    if twice := [file for file, count in collections.Counter(files).items() if count > 1]:
        logger.warning("%s is named more than once, and is read each time", ", ".join(twice))
    return files


def contents(path: Path) -> bytes | bytearray | mmap.mmap:
    """Returns the bytes of a file; a gzip file is unpacked.

    Raises:
      UserError: the file does not exist or cannot be read, or it is a gzip file that is damaged or too large.
    """
    file = os.path.expanduser(path)
    try:
        with open(file, "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):  # a pipe
                return _read_at_most(opened, _ALWAYS_FINE, path)
            size = os.fstat(opened.fileno()).st_size
            if not size:
                return b""
            if os.fspath(file).endswith(".gz") or opened.peek(2)[:2] == _GZIP:
                with gzip.open(opened) as unpacked:
                    return _read_at_most(unpacked, max(_ALWAYS_FINE, _MOST_TIMES * size), path)
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read {os.fspath(path)}: it is not a gzip file, or it is damaged ({error}).") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"Cannot read {os.fspath(path)}: {reason}.") from error


def _read_at_most(file: Any, limit: int, path: Path) -> bytearray:
    found = bytearray()
    while block := file.read(_BLOCK):
        found += block
        if len(found) > limit:
            raise UserError(
                f"{os.fspath(path)} holds more than {limit >> 20} MiB when it is read to its end, too much to keep in "
                "memory: is it the right file? If so, unpack it: plain files are not kept in memory."
            )
    return found


def text(path: Path) -> str:
    """Returns the text of a file, without a byte order mark.

    Raises:
      UserError: as `contents`, or it is not UTF-8.
    """
    found = contents(path)
    try:
        return bytes(found).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + bytes(found[: error.start]).count(b"\n")
        raise UserError(f"{os.fspath(path)}:{line}: not UTF-8 ({error.reason}).") from error


def json_value(path: Path) -> Any:
    """Returns the contents of a JSON file; None if it is empty.

    Raises:
      UserError: as `text`, or it is not JSON.
    """
    found = text(path)
    if not found.strip():
        return None
    try:
        return json_lines.parse(found)
    except ValueError as error:
        line = f":{error.__cause__.lineno}" if isinstance(error.__cause__, json.JSONDecodeError) else ""
        raise UserError(f"{os.fspath(path)}{line}: {error}.") from error


class Indexed(Sequence[T]):
    """A sequence that makes each item on access."""

    @abc.abstractmethod
    def item(self, index: int) -> T:
        """Returns the item at an index, from 0 on."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(number) for number in range(*index.indices(len(self)))]
        return self.item(index)


class Pieces(Indexed[str]):
    """The pieces of a text file that match a pattern, without the line ends around them.

    Raises:
      UserError: as `contents`; on access, text that is not UTF-8.
    """

    def __init__(self, path: str, pattern: re.Pattern[bytes] = LINE):
        self._path = path
        self._content = contents(path)
        start = len(_BOM) if self._content[: len(_BOM)] == _BOM else 0
        edges = (edge for match in pattern.finditer(self._content, start) for edge in match.span(1))
        spans = np.fromiter(edges, np.int64).reshape(-1, 2)
        self._spans = spans[spans[:, 0] >= 0]

    def __len__(self) -> int:
        return len(self._spans)

    def item(self, index: int) -> str:
        start, end = self._spans[index]
        try:
            return self._content[start:end].decode("utf-8").strip("\r\n").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(index)}: not UTF-8 ({error.reason}).") from error

    def where(self, index: int) -> str:
        """Returns `file:line` of a piece."""
        start = int(self._spans[index][0])
        blocks = (self._content[i : min(i + _BLOCK, start)] for i in range(0, start, _BLOCK))
        line = 1 + sum(block.count(b"\n") for block in blocks)
        return f"{self._path}:{line}"
