r"""Texts with holes, read from JSON lines, as rows in which a model writes only the holes.

A line is {"template": "def f(x):<hole:16> return y"}, with "inputs" if the task has inputs. `<hole:N>` is a hole of N
tokens, `<hole:N?>` one of at most N, and `<hole:?>` one of as many as fit. After a backslash, `\<hole:16>`, it is plain
text; two backslashes stand for one before a hole.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from diffusion_t5x import json_lines
from diffusion_t5x.data import text_files
from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.data.dataset import OfTexts
from diffusion_t5x.data.rows import Row, RowLayout, fill_batches
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.text_rows import TextRows
from diffusion_t5x.data.vocabularies import TokenIds, encode_part
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.errors import UserError, did_you_mean

_HOLE = re.compile(r"(\\*)<hole(?::([^<>]*))?>")
_WHAT_A_LINE_HAS = 'a line is {"template": "text with a <hole:8> in it"}, and maybe "inputs"'


@dataclasses.dataclass(frozen=True)
class Hole:
    """A hole in a text.

    Attributes:
      size: number of tokens; of a hole of unknown length the maximum, None for as many as fit.
      is_known: the hole has exactly that many.
    """

    size: int | None
    is_known: bool = True


@dataclasses.dataclass(frozen=True)
class Template:
    """A text with holes.

    Attributes:
      text: the text as written in the file.
      inputs: the inputs that the text is written for; None for none.
      parts: the texts before, between and after the holes: one more than there are holes.
      holes: the holes. Adjacent ones of known length are one hole.
      place: file and line, for messages.
    """

    text: str
    inputs: str | None
    parts: Sequence[str]
    holes: Sequence[Hole]
    place: str

    @classmethod
    def of(cls, text: str, inputs: str | None, place: str) -> Self:
        """Parses a text with holes. Raises a UserError if it has no hole."""
        return cls(text, inputs, *_split(text, place), place)

    @property
    def least_size(self) -> int:
        """Number of slots that the holes need: one of a hole that may have as many as fit."""
        return sum(hole.size or 1 for hole in self.holes)

    def sizes(self, room: int) -> list[int]:
        """Returns the number of slots of each hole. Those that may have as many as fit share what the others leave."""
        open_ended = sum(hole.size is None for hole in self.holes)
        left = room - sum(hole.size or 0 for hole in self.holes)
        return [left // open_ended if hole.size is None else hole.size for hole in self.holes]


class Templates(OfTexts):
    """Templates, at least one, in place of a task's examples.

    The task, or an object like it, has the vocabulary, the lengths and the layout of the rows. `fingerprint` is a hash
    of the templates' file.
    """

    pack = False

    def __init__(
        self, templates: Sequence[Template], dataset: SeqioDataset | TextRows, name: str = "", fingerprint: str = ""
    ):
        self.name, self.fingerprint = name, fingerprint
        self._templates, self._dataset = templates, dataset

    @classmethod
    def read(cls, path: str, dataset: SeqioDataset) -> Self:
        """Reads the templates in a file of JSON lines.

        Raises:
          UserError: there is no such file, or a line is not a template.
        """
        lines = text_files.Pieces(path, text_files.ANY_LINE)
        templates = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not templates:
            raise UserError(f"{path} is empty: {_WHAT_A_LINE_HAS}.")
        fingerprint = hashlib.sha256(text_files.contents(path)).hexdigest()[:16]
        return cls(templates, dataset, pathlib.Path(path).stem, fingerprint)

    @property
    def task_feature_lengths(self) -> Mapping[str, int]:
        return self._dataset.task_feature_lengths

    @property
    def row_length(self) -> int:
        return self._dataset.row_length

    @property
    def batch_size(self) -> int:
        return self._dataset.batch_size

    @property
    def architecture(self) -> Architecture:
        return self._dataset.architecture

    def vocabulary(self) -> AnyVocabulary:
        return self._dataset.vocabulary()

    def check(self) -> None:
        """Encodes all templates.

        Raises:
          UserError: as `SeqioDataset.check`, except that the task may lack the split; or a template does not fit.
        """
        self._dataset.check_task()
        if self.have_unknown_lengths:
            self.token_ids().resizing()
        self._rows  # noqa: B018

    @property
    def have_unknown_lengths(self) -> bool:
        """True if a hole has no known length: only some decoders fill it, see `Decoder.resizes_holes`."""
        return any(not hole.is_known for template in self._templates for hole in template.holes)

    def token_ids(self) -> TokenIds:
        """The task's special ids, as they apply in holes."""
        return super().token_ids().for_infilling()

    def num_eval_examples(self, num_examples: int | None = None) -> int:
        """Returns the number of templates, at most `num_examples`."""
        return len(self._templates[:num_examples])

    def eval_batches(self, num_examples: int | None = None) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
        """Yields batches and their rows' fields, like `SeqioDataset.eval_batches`.

        The template is in the place of the targets: tokens, holes, and EOS and pad as in the task. Only the holes are
        in `target_mask`. If a hole has no known length, rows have `Batch.holes`, and spare slots at the end.
        """
        rows = [(row, template) for (row, _), template in zip(self._rows, self._templates, strict=True)][:num_examples]
        for batch, group in fill_batches(rows, self.batch_size, self._dataset.vocabulary().pad_id):
            described = (
                {"example_id": number, "inputs_pretokenized": template.inputs or "", "template": template.text}
                for number, template in zip(batch.example_ids.tolist(), group, strict=False)
            )
            yield batch, list(described)

    def text_mask(self, batch: Batch) -> np.ndarray:
        """Returns bool `[B, L]`: True for the templates in a batch of `eval_batches`, and for what follows them."""
        starts = np.array([start for _, start in self._rows])
        starts = starts[np.minimum(batch.example_ids, len(starts) - 1)]  # rows that fill up a batch have other ids
        return np.asarray(batch.segment_ids > 0) & (np.arange(batch.tokens.shape[1]) >= starts[:, None])

    @functools.cached_property
    def _rows(self) -> list[tuple[Row, int]]:
        """A row for each template, and the position in it where the template begins."""
        rows = [self._row(template) for template in self._templates]
        if not self.have_unknown_lengths:
            return rows
        num_spare = max(int(np.count_nonzero(row["holes"])) for row, _ in rows)
        return [(self._with_spare_slots(row, num_spare), start) for row, start in rows]

    def _row(self, template: Template) -> tuple[Row, int]:
        dataset = self._dataset
        lengths, pad_id = dataset.task_feature_lengths, dataset.vocabulary().pad_id
        if template.inputs is not None and "inputs" not in lengths:
            raise UserError(f"{template.place}: {dataset.name} has no inputs; leave them out.")
        texts = {"inputs": [template.inputs or ""], "targets": template.parts}
        tokens = {name: self._encode(texts[name], template.place) for name in lengths}
        ends = {name: [dataset.vocabulary().eos_id] if dataset.adds_eos(name) else [] for name in lengths}
        for name, limit in lengths.items():
            holes = template.least_size if name == "targets" else 0
            size = sum(map(len, [*tokens[name], ends[name]])) + holes
            if size > limit:
                what = "template" if name == "targets" else "inputs"
                raise UserError(
                    f"{template.place}: {what} of {size} tokens ({holes} in holes, {len(ends[name])} for EOS), but "
                    f"TASK_FEATURE_LENGTHS has room for {limit} {name}."
                )
        text, is_hole = list(tokens["targets"][0]), [False] * len(tokens["targets"][0])
        room = lengths["targets"] - sum(map(len, [*tokens["targets"], ends["targets"]]))
        numbers, number = [0] * len(text), 0
        for hole, size, part in zip(template.holes, template.sizes(room), tokens["targets"][1:], strict=True):
            text += [pad_id] * size + part
            is_hole += [True] * size + [False] * len(part)
            number += not hole.is_known
            numbers += [0 if hole.is_known else number] * size + [0] * len(part)
        features = {"targets": np.array(text + ends["targets"], np.int32)}
        if "inputs" in lengths:
            features["inputs"] = np.array(tokens["inputs"][0] + ends["inputs"], np.int32)
        layout = RowLayout(lengths, dataset.architecture, dataset.canvas, pad_id)
        sequences = layout.sequences(features)
        start = int(np.argmax(sequences["target_mask"]))
        sequences["target_mask"][:] = False
        sequences["target_mask"][start : start + len(is_hole)] = is_hole
        row = layout.row(sequences)
        if self.have_unknown_lengths:
            row["holes"] = np.zeros(len(row["tokens"]), np.int32)
            row["holes"][start : start + len(numbers)] = numbers
        return row, start

    def _with_spare_slots(self, row: Row, number: int) -> Row:
        """Returns a row with so many more slots, spare ones as far as its canvas has holes (see `Batch.holes`)."""
        length = len(row["tokens"])
        needed = np.count_nonzero(row["holes"]) if self._dataset.canvas else 0
        row = {name: x if name.startswith("encoder") else np.pad(x, (0, number)) for name, x in row.items()}
        row["tokens"][length:] = self._dataset.vocabulary().pad_id
        row["holes"][length : length + needed] = -1
        return row

    def _encode(self, parts: Sequence[str], place: str) -> list[list[int]]:
        try:
            return [encode_part(self._dataset.vocabulary(), part, number == 0) for number, part in enumerate(parts)]
        except UserError as error:
            raise UserError(f"{place}: {error}") from None


def escape(text: str) -> str:
    """Returns a part of a template that stands for this text, whatever holes it may seem to have."""
    return _HOLE.sub(lambda match: match[1] * 2 + "\\" + match[0][len(match[1]) :], text)


def _parse(line: str, place: str) -> Template:
    try:
        parsed = json_lines.parse(line, distinct=True)
    except ValueError as error:
        raise UserError(f"{place}: {error}; {_WHAT_A_LINE_HAS}.") from None
    fields = ("template", "inputs")
    if not isinstance(parsed, dict) or "template" not in parsed or not set(parsed) <= set(fields):
        names = parsed if isinstance(parsed, dict) else ()
        unknown = [f"unknown field {name!r}.{did_you_mean(name, fields)}" for name in names if name not in fields]
        what = unknown[0] if unknown else "no template."
        raise UserError(f"{place}: {what} {_WHAT_A_LINE_HAS.capitalize()}.")
    if not all(isinstance(text, str) for text in parsed.values()):
        raise UserError(f"{place}: template and inputs must be text; {_WHAT_A_LINE_HAS}.")
    return Template.of(parsed["template"], parsed.get("inputs"), place)


def _split(text: str, place: str) -> tuple[list[str], list[Hole]]:
    """Returns the texts around the holes, and the holes."""
    parts, end = [""], 0
    holes: list[Hole] = []
    for match in _HOLE.finditer(text):
        backslashes, size = match.groups()
        parts[-1] += text[end : match.start()] + backslashes[: len(backslashes) // 2]
        end = match.end()
        if len(backslashes) % 2:
            parts[-1] += match[0][len(backslashes) :]
            continue
        written = match[0][len(backslashes) :]
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}\??|\?", size or "", re.ASCII):
            raise UserError(
                f"{place}: {written} is not a hole: <hole:N> has N tokens, <hole:N?> at most N, at least one, and "
                "<hole:?> as many as fit. To write it as plain text, put a backslash before it (two in JSON)."
            )
        hole = Hole(int(size.strip("?")) if size != "?" else None, not size.endswith("?"))
        if not holes or parts[-1]:
            holes.append(hole)
            parts.append("")
        elif hole.is_known and holes[-1].is_known:
            holes[-1] = Hole((holes[-1].size or 0) + (hole.size or 0))
        else:
            raise UserError(f"{place}: {written} follows another hole, and their lengths are not known: make them one.")
    parts[-1] += text[end:]
    if not holes:
        raise UserError(f"{place}: the template has no hole; {_WHAT_A_LINE_HAS}.")
    return parts, holes
