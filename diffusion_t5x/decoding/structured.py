"""Languages from what a user asks for: a regular expression or a JSON schema."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from diffusion_t5x.data import text_files
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.json_schema import pattern_of
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.errors import UserError

Rows = TypeVar("Rows")


def language_of(
    regex: str | None,
    json_schema: "str | Mapping[str, Any] | None",
    vocabulary: AnyVocabulary,
    *,
    begins: bool = True,
    end_ids: Collection[int] = (),
) -> Language | None:
    """Returns the texts that a user allows; None for all.

    Args:
      regex: a regular expression of whole texts, in the syntax of Rust's regex crate.
      json_schema: the path of a JSON schema, or the schema, see `json_schema.pattern_of`.
      vocabulary, begins, end_ids: see `Language`.

    Raises:
      UserError: both are given, or one is invalid.
    """
    if regex is not None and json_schema is not None:
        raise UserError("A text has one form: give a regular expression or a JSON schema, not both.")
    if json_schema is not None:
        if isinstance(json_schema, Mapping):
            regex = pattern_of(json_schema, "The JSON schema")
        else:
            regex = pattern_of(text_files.json_value(json_schema), json_schema)
    return None if regex is None else Language(regex, vocabulary, begins, end_ids)


def checked(
    language: Language | None, batches: Iterable[tuple[Batch, Rows]], *, in_holes: bool = False
) -> Iterator[tuple[Batch, Rows]]:
    """Yields batches; raises a UserError before one with a row, or a hole, that no text of the language fits."""
    for batch, rows in batches:
        if language is not None:
            mask = np.pad(np.asarray(batch.target_mask), ((0, 0), (1, 1))).astype(np.int8)
            edges = np.diff(mask, axis=1)
            sizes = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
            how = (
                "Make the hole larger, <hole:N>."
                if in_holes
                else "Give it more tokens: --length or TASK_FEATURE_LENGTHS."
            )
            language.check_fits(sizes.tolist(), how, exactly=in_holes)
        yield batch, rows
