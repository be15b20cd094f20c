"""Tasks over user files, set up in gin: no Python is needed.

Every record is checked before the first batch, so that a broken line is reported at once. Each epoch is shuffled over
all files, with an exact position.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_t5x.data import text_files
from diffusion_t5x.data.text_files import Patterns
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.tasks import registration, sources
from diffusion_t5x.tasks.readers import Fields, Reader, Records

logger = logging.getLogger(__name__)


_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
# A conversion or format behind a field's name, as in "{price:.2f}".
_FORMATTED = re.compile(r"(?s)(.*?)(?:!([rsa]))?(?::(.*))?")
_CONVERSIONS: dict[str | None, Callable[[Any], Any]] = {"r": repr, "s": str, "a": ascii, None: lambda value: value}


class _Template:
    """Text with `{field}` in it; `{{` and `}}` are braces.

    Everything between the braces is the field's name if a record has such a field, including dots and brackets.
    Otherwise it may end in a conversion or a format, as in Python's format strings.
    """

    def __init__(self, text: str):
        self._literals, self.fields, end = [""], [], 0
        for match in _BRACES.finditer(text):
            self._literals[-1] += text[end : match.start()]
            end = match.end()
            if match[1] is not None:
                self.fields.append(match[1])
                self._literals.append("")
            elif len(match[0]) == 2:
                self._literals[-1] += match[0][0]
            else:
                raise UserError(f"{text!r} is not a template: a single {match[0]!r}. Write {{{{ and }}}} for braces.")
        self._literals[-1] += text[end:]

    def fill(self, record: Fields) -> str:
        values = [self._value(name, record) for name in self.fields]
        return "".join(itertools.chain(*itertools.zip_longest(self._literals, values, fillvalue="")))

    @staticmethod
    def _value(name: str, record: Fields) -> str:
        conversion = form = None
        if name not in record:
            parts = _FORMATTED.fullmatch(name)
            assert parts is not None, "each part may be missing"
            short, conversion, form = parts.groups()
            if short not in record:
                hint = did_you_mean(short, record) or f" There are {', '.join(map(repr, record))}."
                raise ValueError(f"no field {short!r}.{hint}")
            name = short
        value = record[name]
        if value is None or isinstance(value, list | dict):
            raise ValueError(f"the field {name!r} is {json.dumps(value)[:40]}, not text.")
        return format(_CONVERSIONS[conversion](value), form or "")


def source(
    files: Mapping[str, Patterns],
    reader: Reader,
    templates: Mapping[str, str],
    held_out: Mapping[str, float] | None = None,
) -> sources.Records:
    """Returns the source of texts made from the records of files; see `task`."""
    filled = {name: _Template(text) for name, text in templates.items()}

    def read(names: Sequence[str]) -> Records:
        found = reader.read(names)
        used = {name for template in filled.values() for name in template.fields}
        if unused := [name for name in (found[0] if len(found) else ()) if name not in used]:
            logger.info("%s: fields that no template names: %s", ", ".join(names), ", ".join(unused))
        return dataclasses.replace(found, parse=lambda i: {k: t.fill(found.parse(i)) for k, t in filled.items()})

    return source_of(files, read, held_out)


def source_of(
    files: Mapping[str, Patterns],
    read_files: Callable[[Sequence[str]], Records],
    held_out: Mapping[str, float] | None = None,
    finish: Callable[[Fields], sources.Record] = dict,
) -> sources.Records:
    """Returns the source of records, all of which are checked before the first is returned.

    Args:
      files, held_out: see `task`. A hash of a record's first field, a text, decides.
      read_files: returns the records of all files of a split.
      finish: converts a record to the source's example.
    """
    files, held_out = text_files.by_split(files), dict(held_out or {})
    if held_out and ("train" not in files or held_out.keys() & files.keys() or sum(held_out.values()) >= 100):
        raise UserError(f"held_out takes percentages of 'train' for splits without files: {held_out}.")

    @functools.cache
    def read(split: str) -> tuple[Records, np.ndarray]:
        """Returns the records of a split's files, and the index of the split that each belongs to."""
        names = text_files.expand(files[split])
        found = read_files(names)
        splits = [split, *(held_out if split == "train" else {})]
        shares = [held_out[name] for name in splits[1:]]
        belongs = np.fromiter((_share_of(next(iter(record.values())), shares) for record in found), np.int8)
        for name, count in zip(splits, np.bincount(belongs, minlength=len(splits)), strict=True):
            if not count:
                raise UserError(f"No record of {', '.join(names)} belongs to the split {name!r}.")
            logger.info("%s: %d records of %s", name, count, ", ".join(names))
        return found, belongs

    def load(split: str) -> Records:
        found, belongs = read("train" if split in held_out else split)
        members = np.flatnonzero(belongs == (1 + [*held_out].index(split) if split in held_out else 0))
        return Records(len(members), lambda i: finish(found.parse(members[i])), lambda i: found.where(members[i]))

    def list_files(split: str) -> list[str]:
        return text_files.expand(files["train" if split in held_out else split])

    return sources.Records(load, [*files, *held_out], list_files)


def _share_of(text: str, percentages: Sequence[float]) -> int:
    """Returns the share of a text by its stable hash: 1 for the first percentage, 2 for the second ..., else 0."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 * 100
    for share, percent in enumerate(percentages, 1):
        if bucket < percent:
            return share
        bucket -= percent
    return 0


def task(
    name: str,
    files: Mapping[str, Patterns],
    reader: Reader,
    vocabulary_file: str | None,
    inputs: str | None = "{inputs}",
    targets: str = "{targets}",
    objective: registration.Preprocessor | None = None,
    held_out: Mapping[str, float] | None = None,
    num_shots: int = 0,
    metric_fns: Sequence[registration.MetricFn] = (),
    inputs_end: bool = True,
) -> str:
    """Registers a SeqIO task over files and returns its name. Files are read when the task is.

    Args:
      name: name of the task.
      files: paths or glob patterns for each split.
      reader: `readers.Structured`, `Jsonl`, `Tsv`, `Text` or `Parallel`.
      vocabulary_file: a SentencePiece model; None for bytes.
      inputs, targets: templates, such as "translate English to French: {english}". Without inputs every token is a
        target.
      objective: pretraining objective (`@preprocessors.prefix_lm` ...): applied to the targets; inputs are ignored.
      held_out: percentages of the records of "train" for splits without files, such as {"validation": 1.0}. A hash of
        the inputs (without inputs, of the targets) decides, so equal inputs stay together.
      num_shots: number of examples of "train" before each input.
      metric_fns: for instance `(@metrics.bleu, @metrics.exact_match)`.
      inputs_end: inputs end in EOS, as T5's do. Most decoder-only models were trained without.

    Raises:
      UserError: an invalid template, no vocabulary file, or invalid shots or shares; on first reading, errors in a
        file.
    """
    has_inputs = inputs is not None and objective is None
    templates = {"targets": targets} if inputs is None or not has_inputs else {"inputs": inputs, "targets": targets}
    if not targets:
        raise UserError("TARGETS is empty. Write a template with a field, such as '{targets}'.")
    found = source(files, reader, templates, held_out)
    return registration.task(
        name, found, [], vocabulary_file, has_inputs=has_inputs, objective=objective, num_shots=num_shots,
        metric_fns=metric_fns, shuffle_buffer=1, inputs_end=inputs_end,
    )  # fmt: skip
