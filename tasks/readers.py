"""Readers of text files: JSON lines, TSV, plain text and parallel text, each also as .gz, as sequences of records.

Files are read in place: an index of where records begin is held in memory, the text of compressed files, too.
"""

import abc
import bisect
import dataclasses
import gzip
import itertools
import logging
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_t5x import json_lines
from diffusion_t5x.errors import UserError

logger = logging.getLogger(__name__)
Fields = Mapping[str, Any]

_LINE = re.compile(rb"[^\n]*\S[^\n]*")
_ANY_LINE = re.compile(rb"[^\n]*\n|[^\n]+")
_DOCUMENTS = {
    "line": _LINE,
    "paragraphs": re.compile(rb"[^\n]*\S[^\n]*(?:\n(?![ \t\r]*(?:\n|\Z))[^\n]*)*"),
    "file": re.compile(rb"(?s).*\S.*"),
}


class Pieces(Sequence[str]):
    """The pieces of a text file that a pattern finds, without the line ends around them.

    Raises:
      UserError: no such file, nothing in it, or (on access) text that is not UTF-8.
    """

    def __init__(self, path: str, pattern: re.Pattern[bytes]):
        self._path = path
        try:
            self._content = _content(path)
        except (OSError, EOFError) as error:
            raise UserError(f"Cannot read {path}: {error}.") from error
        edges = (edge for match in pattern.finditer(self._content) for edge in match.span())
        self._spans = np.fromiter(edges, np.int64).reshape(-1, 2)
        if not len(self):
            raise UserError(f"{path} is empty.")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        start, end = self._spans[index]
        try:
            return self._content[start:end].decode("utf-8").strip("\r\n").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(index)}: not UTF-8 ({error.reason}).") from error

    def where(self, index: int) -> str:
        """`file:line` of a piece."""
        lines = self._content[: self._spans[index][0]].count(b"\n")
        return f"{self._path}:{1 + lines}"


def _content(path: str) -> bytes | mmap.mmap:
    if path.endswith(".gz"):
        with gzip.open(path) as file:
            return file.read()
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b""


class Reader(abc.ABC):
    """How files are read: as a sequence of records, which are fields by name, and where each one stands."""

    @abc.abstractmethod
    def read(self, files: Sequence[str]) -> "Records":
        """The records of all files."""


@dataclasses.dataclass(frozen=True)
class Records(Sequence[Fields]):
    """`parse` of each index below `size`; a mistake in it is told with `where` it is."""

    size: int
    parse: Callable[[int], Fields]
    where: Callable[[int], str]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Fields:
        try:
            return self.parse(index)
        except ValueError as error:
            raise UserError(f"{self.where(index)}: {error}") from error


def _join(parts: Sequence[Records]) -> Records:
    ends = list(itertools.accumulate(map(len, parts)))

    def find(index: int) -> tuple[Records, int]:
        part = bisect.bisect_right(ends, index)
        return parts[part], index - (ends[part] - len(parts[part]))

    def parse(index: int) -> Fields:
        records, local = find(index)
        return records.parse(local)

    def where(index: int) -> str:
        records, local = find(index)
        return records.where(local)

    return Records(ends[-1], parse, where)


@dataclasses.dataclass(frozen=True)
class Jsonl(Reader):
    """A JSON object a line; its fields are texts or numbers."""

    def read(self, files: Sequence[str]) -> Records:
        def records(pieces: Pieces) -> Records:
            return Records(len(pieces), lambda i: _json_object(pieces[i]), pieces.where)

        return _join([records(Pieces(file, _LINE)) for file in files])


def _json_object(line: str) -> Fields:
    value = json_lines.parse(line)
    if not isinstance(value, dict):
        raise ValueError('not a JSON object: {"field": "text", ...} is wanted.')
    return value


@dataclasses.dataclass(frozen=True)
class Tsv(Reader):
    """Columns between tabs, without quoting.

    Attributes:
      columns: their names; None takes them from each file's first line.
    """

    columns: Sequence[str] | None = None

    def read(self, files: Sequence[str]) -> Records:
        def records(pieces: Pieces) -> Records:
            columns = self.columns or pieces[0].split("\t")
            first = 0 if self.columns else 1

            def parse(index: int) -> Fields:
                values = pieces[first + index].split("\t")
                if len(values) != len(columns):
                    raise ValueError(f"{len(values)} columns, not the {len(columns)}: {', '.join(columns)}.")
                return dict(zip(columns, values, strict=True))

            return Records(len(pieces) - first, parse, lambda i: pieces.where(first + i))

        return _join([records(Pieces(file, _LINE)) for file in files])


@dataclasses.dataclass(frozen=True)
class Text(Reader):
    """Plain text, as field `text`.

    Attributes:
      document: what a record is: "line", "paragraphs" (up to an empty line) or "file".
    """

    document: str = "line"

    def read(self, files: Sequence[str]) -> Records:
        if self.document not in _DOCUMENTS:
            raise UserError(f"Text.document must be one of {', '.join(_DOCUMENTS)}, not {self.document!r}.")

        def records(pieces: Pieces) -> Records:
            return Records(len(pieces), lambda i: {"text": pieces[i]}, pieces.where)

        return _join([records(Pieces(file, _DOCUMENTS[self.document])) for file in files])


@dataclasses.dataclass(frozen=True)
class Parallel(Reader):
    """Two files, the lines of which belong together. Where either is blank, both are left out, and counted in the log.

    Attributes:
      fields: names for a line of the first and of the second file.
    """

    fields: tuple[str, str] = ("source", "target")

    def read(self, files: Sequence[str]) -> Records:
        if len(files) != 2:
            raise UserError(f"Parallel text is two files, not {len(files)}: {', '.join(files)}.")
        first, second = (Pieces(file, _ANY_LINE) for file in files)
        if len(first) != len(second):
            raise UserError(f"{files[0]} has {len(first)} lines, {files[1]} has {len(second)}: they must be as many.")
        kept = [i for i in range(len(first)) if first[i].strip() and second[i].strip()]
        if blank := len(first) - len(kept):
            logger.warning("%s, %s: %d of %d pairs have a blank line, left out", *files, blank, len(first))
        return Records(
            len(kept),
            lambda i: dict(zip(self.fields, (first[kept[i]], second[kept[i]]), strict=True)),
            lambda i: first.where(kept[i]),
        )
