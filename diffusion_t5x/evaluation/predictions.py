"""Reads predictions made elsewhere and matches them with examples."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x import json_lines
from diffusion_t5x.data import text_files
from diffusion_t5x.errors import UserError

_WHAT_A_LINE_HAS = 'a line is {"prediction": TEXT}, or {"predictions": [TEXT, ...]}, and maybe an "example_id"'


def read_predictions(path: str) -> list[dict[str, Any]]:
    """Returns the lines of a file of JSON lines, each with "prediction" (text) or "predictions" (texts).

    Raises:
      UserError: there is no such file, or a line has neither.
    """
    lines = text_files.Pieces(path, text_files.ANY_LINE)
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def add_predictions(
    examples: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], path: str, where: str
) -> list[dict[str, Any]]:
    """Returns the examples with their "prediction" and, if there are samples, "predictions", the first of which it is.

    Args:
      examples: the examples of a split, in order.
      lines: the lines of `path`. With an "example_id", the example's index in the split from 0 on, they may come in any
        order; without, they are in the split's order.
      path: the file, for messages.
      where: a description of the examples, for messages.

    Raises:
      UserError: the lines do not match the examples one to one.
    """
    with_id = [number for number, line in enumerate(lines, 1) if "example_id" in line]
    if with_id and len(with_id) < len(lines):
        first = next(number for number in range(1, len(lines) + 1) if number not in with_id)
        raise UserError(f'{path}:{first}: this line has no "example_id", but line {with_id[0]} has one.')
    places: dict[int, int] = {}
    for place, line in enumerate(lines):
        example_id = line.get("example_id", place)
        if not isinstance(example_id, int) or not 0 <= example_id < len(examples):
            raise UserError(f"{path}:{place + 1}: no example {example_id!r} in {where}, which has {len(examples)}.")
        if example_id in places:
            raise UserError(f"{path}:{place + 1}: example {example_id} again; line {places[example_id] + 1} has it.")
        places[example_id] = place
    if missing := [number for number in range(len(examples)) if number not in places]:
        raise UserError(
            f"{path}:{len(lines)}: ends without a line for example {missing[0]}; {where} has {len(examples)} examples. "
            f"To score only the first ones, set NUM_DECODED_EXAMPLES={len(lines)}; for another split, set SPLIT."
        )
    return [{**example, **_texts(lines[places[number]])} for number, example in enumerate(examples)]


def _texts(line: Mapping[str, Any]) -> dict[str, Any]:
    if "predictions" in line:
        return {"prediction": line["predictions"][0], "predictions": line["predictions"]}
    return {"prediction": line["prediction"]}


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        parsed = json_lines.parse(line, distinct=True)
    except ValueError as error:
        raise UserError(f"{place}: {error}; {_WHAT_A_LINE_HAS}.") from None
    if not isinstance(parsed, dict) or not {"prediction", "predictions"} & set(parsed):
        raise UserError(f"{place}: no prediction; {_WHAT_A_LINE_HAS}.")
    texts = parsed.get("predictions", [parsed.get("prediction")])
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: predictions must be text; {_WHAT_A_LINE_HAS}.")
    return parsed
