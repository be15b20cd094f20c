"""Readers of files: JSON lines, TSV, plain text and parallel text, also as .gz, and Parquet, as sequences of records.

`data.text_files` opens, unpacks and splits text files.
"""

import abc
import bisect
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_t5x import json_lines
from diffusion_t5x.data import text_files
from diffusion_t5x.data.text_files import Indexed, Pieces, T
from diffusion_t5x.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)
Fields = Mapping[str, Any]

PARQUET = ".parquet"
_DOCUMENTS = {"line": text_files.LINE, "paragraphs": text_files.PARAGRAPHS, "file": text_files.WHOLE}


class Reader(abc.ABC):
    """Reads files as a sequence of records, which are fields by name, and tells the place of each."""

    @abc.abstractmethod
    def read(self, files: Sequence[str]) -> "Records":
        """Returns the records of all files."""


@dataclasses.dataclass(frozen=True)
class Records(Indexed[T]):
    """The results of `parse` for each index below `size`; error messages include the place, `where`."""

    size: int
    parse: Callable[[int], T]
    where: Callable[[int], str]

    def __len__(self) -> int:
        return self.size

    def item(self, index: int) -> T:
        try:
            return self.parse(index)
        except ValueError as error:
            raise UserError(f"{self.where(index)}: {error}") from error


def _read_each(files: Sequence[str], read: Callable[[str], Records]) -> Records:
    """Returns the records of all files, one file after another. Files without any are logged.

    Raises:
      UserError: no file has a record.
    """
    parts = [read(file) for file in files]
    if empty := [file for file, part in zip(files, parts, strict=True) if not len(part)]:
        if len(empty) == len(files):
            raise UserError(f"{', '.join(files)} {'is' if len(files) == 1 else 'are'} empty.")
        logger.warning("%d of %d files are empty and left out: %s", len(empty), len(files), ", ".join(empty))
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
    """One JSON object per line, whose fields are texts or numbers. Duplicate fields are refused."""

    def read(self, files: Sequence[str]) -> Records:
        return _read_each(files, _read_jsonl)


def _read_jsonl(file: str) -> Records:
    pieces = Pieces(file)
    return Records(len(pieces), lambda i: json_lines.parse_object(pieces[i]), pieces.where)


@dataclasses.dataclass(frozen=True)
class Structured(Reader):
    """Parquet from files whose names end in .parquet, and JSON lines from all others.

    A Parquet file is held in memory, as Arrow has it. Its columns of bytes, such as images, are left out.
    """

    def read(self, files: Sequence[str]) -> Records:
        return _read_each(files, lambda file: _read_parquet(file) if file.endswith(PARQUET) else _read_jsonl(file))


def _read_parquet(file: str) -> Records:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with open(os.path.expanduser(file), "rb") as opened:
            content = parquet.ParquetFile(opened)
            names = [field.name for field in content.schema_arrow if not _holds_bytes(field.type)]
            table = content.read(names)
    except pa.ArrowException as error:
        raise UserError(f"{file} is not a Parquet file that can be read: {error}.") from error
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror or error}.") from error
    if left_out := set(content.schema_arrow.names) - set(names):
        logger.info("%s: columns of bytes are left out: %s", file, ", ".join(sorted(left_out)))
    return Records(table.num_rows, lambda i: table.slice(i, 1).to_pylist()[0], lambda i: f"{file}: row {i + 1}")


def _holds_bytes(kind: "pa.DataType") -> bool:
    """True for a type of Arrow that holds bytes, directly or in lists and objects."""
    from pyarrow import types

    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return types.is_binary(kind) or types.is_large_binary(kind) or any(map(_holds_bytes, inner))


@dataclasses.dataclass(frozen=True)
class Tsv(Reader):
    """Tab-separated columns, without quoting.

    Attributes:
      columns: names of the columns; None takes them from each file's first line.
    """

    columns: Sequence[str] | None = None

    def read(self, files: Sequence[str]) -> Records:
        return _read_each(files, self._read_file)

    def _read_file(self, file: str) -> Records:
        pieces = Pieces(file)
        first = int(self.columns is None)
        if not len(pieces):
            return Records(0, dict[int, Fields]().__getitem__, pieces.where)
        columns = pieces[0].split("\t") if self.columns is None else self.columns
        if twice := [name for number, name in enumerate(columns) if name in columns[:number]]:
            place = f"{pieces.where(0)}: the header" if self.columns is None else "Tsv.columns"
            raise UserError(f"{place} names the column {twice[0]!r} twice: give each column its own name.")

        def parse(index: int) -> Fields:
            values = pieces[first + index].split("\t")
            if len(values) != len(columns):
                raise ValueError(f"{len(values)} columns, not the {len(columns)}: {', '.join(columns)}.")
            return dict(zip(columns, values, strict=True))

        return Records(len(pieces) - first, parse, lambda i: pieces.where(first + i))


@dataclasses.dataclass(frozen=True)
class Text(Reader):
    """Plain text, in field `text`.

    Attributes:
      document: the extent of a record: "line", "paragraphs" (up to an empty line) or "file".
    """

    document: str = "line"

    def read(self, files: Sequence[str]) -> Records:
        if self.document not in _DOCUMENTS:
            raise UserError(f"Text.document must be one of {', '.join(_DOCUMENTS)}, not {self.document!r}.")

        def records(file: str) -> Records:
            pieces = Pieces(file, _DOCUMENTS[self.document])
            return Records(len(pieces), lambda i: {"text": pieces[i]}, pieces.where)

        return _read_each(files, records)


@dataclasses.dataclass(frozen=True)
class Parallel(Reader):
    """Two files with corresponding lines. If either line is blank, both are left out, and counted in the log.

    Attributes:
      fields: field names for the lines of the first and the second file.
    """

    fields: tuple[str, str] = ("source", "target")

    def read(self, files: Sequence[str]) -> Records:
        if len(files) != 2:
            raise UserError(f"Parallel text needs two files, not {len(files)}: {', '.join(files)}.")
        if len(self.fields) != 2 or self.fields[0] == self.fields[1]:
            raise UserError(f"Parallel.fields must be two different names, not {self.fields!r}.")
        first, second = (Pieces(file, text_files.ANY_LINE) for file in files)
        if len(first) != len(second):
            raise UserError(f"{files[0]} has {len(first)} lines, {files[1]} has {len(second)}: they must be equal.")
        if not len(first):
            raise UserError(f"{', '.join(files)} are empty.")
        kept = [i for i in range(len(first)) if first[i].strip() and second[i].strip()]
        if blank := len(first) - len(kept):
            logger.warning("%s, %s: %d of %d pairs have a blank line and are left out", *files, blank, len(first))
        return Records(
            len(kept),
            lambda i: dict(zip(self.fields, (first[kept[i]], second[kept[i]]), strict=True)),
            lambda i: first.where(kept[i]),
        )
