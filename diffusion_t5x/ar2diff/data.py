"""The data of a conversion: how the files are read, how much there is, and what is held out."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_t5x.ar2diff.command import DataKind
from diffusion_t5x.data import conversations, text_files
from diffusion_t5x.errors import UserError
from diffusion_t5x.tasks import readers

if TYPE_CHECKING:
    import seqio

_ENDS = {".txt": "texts", ".md": "texts", ".jsonl": "jsonl_texts", readers.PARQUET: "jsonl_texts"}
_SAMPLE = 1000  # records that are tokenized to estimate all


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Size and kind of the data.

    Attributes:
      files: as they were named.
      gin_file: reads them.
      unit: what a record is, in the plural.
      num_records: number of records in all files.
      num_tokens: number of tokens in all records, estimated from the first ones.
      held_out: percentage that is not trained on.
    """

    files: tuple[str, ...]
    gin_file: str
    unit: str
    num_records: int
    num_tokens: int
    held_out: float


def look(kind: DataKind, patterns: tuple[str, ...], vocabulary: "seqio.Vocabulary") -> TrainingData:
    """Reads the first records of the files and counts all.

    Args:
      kind: the flag that named them.
      patterns: paths or patterns.
      vocabulary: counts the tokens.

    Raises:
      UserError: files of several kinds, or of a kind that is not read; missing fields; too few records.
    """
    files = text_files.expand(patterns)
    form = _form(files) if kind == "data" else ""
    reader = readers.Text("paragraphs") if form == "texts" else readers.Structured()
    records = reader.read(files)
    first = list(
        itertools.islice(dataclasses.replace(records, parse=lambda i: _fields(kind, records.parse(i))), _SAMPLE)
    )
    texts = [text for values in first for text in _texts(values)]
    if len(records) < 8:
        raise UserError(
            f"{', '.join(patterns)}: {len(records)} records are too few to hold any out. Give at least 8 paragraphs "
            "(between empty lines) or lines."
        )
    counted = sum(len(vocabulary.encode(text)) + 1 for text in texts)
    return TrainingData(
        files=patterns,
        gin_file=f"recipes/ar2diff/shared/{form if kind == 'data' else kind}.gin",
        unit="paragraphs" if form == "texts" else "lines",
        num_records=len(records),
        num_tokens=round(counted * len(records) / len(first)),
        held_out=round(max(1.0, min(20.0, 2400 / len(records)), min(50.0, 400 / len(records))), 1),
    )


def _fields(kind: DataKind, record: Mapping[str, Any]) -> list[Any]:
    """The values of a record that are trained on; raises a ValueError if one is missing."""
    if kind == "chat" and conversations.has_messages(record):
        return [[message["role"], message.get("content")] for message in conversations.read(record).messages]
    names = {"data": ["text"], "prompts": ["inputs", "targets"], "chat": ["messages"]}[kind]
    for name in names:
        if name not in record:
            raise ValueError(f"--{kind} needs a field {name!r} in each line; it has {', '.join(record)}.")
    return [record[name] for name in names]


def _form(files: list[str]) -> str:
    """The kind of text files, by their names: "texts" or "jsonl_texts"."""
    found = {}
    for file in files:
        ends = [end for end in _ENDS if file.removesuffix(".gz").endswith(end)]
        if not ends:
            raise UserError(f"--data={file}: text comes as {', '.join(_ENDS)}, each also as .gz. Rename or convert it.")
        found[_ENDS[ends[0]]] = file
    if len(found) > 1:
        raise UserError(f"--data names files of two kinds, {' and '.join(found.values())}: give one kind.")
    return next(iter(found))


def _texts(values: Iterable[Any]) -> Iterable[str]:
    """The texts in values of JSON."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | dict):
            yield from _texts(value.values() if isinstance(value, dict) else value)
