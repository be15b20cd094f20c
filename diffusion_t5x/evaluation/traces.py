"""Traces of decoding: the canvas at each step, for records and for a terminal."""

import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.text

from diffusion_t5x import terminal
from diffusion_t5x.decoding.decoder import Trace

_MOST_LINES = 12  # of a text in the terminal
_COLOURS = ("#d75f00", "#d78700", "#af8700", "#5f8700", "#008787")  # from unsure to sure, readable on black and white

Frame = list[tuple[str, float]]
"""For each token its text and the probability that it was written with; 0 where nothing has been written yet."""


def compact(
    trace: Trace, written: np.ndarray, num_steps: int, cells: Callable[[Sequence[int]], list[str]]
) -> dict[str, Any]:
    """Returns one text's steps in a record's form, up to its last step.

    Args:
      trace: the text's trace, `[steps + 1, L]`.
      written: bool `[L]`, True for tokens that the decoder writes; others are given.
      num_steps: number of steps that the text took part in.
      cells: returns the texts of tokens, one each.

    Returns:
      "tokens": the texts of all tokens before the first step. "given": the places that no step writes. "steps": for
      each step a list of its changes, `[place, text, confidence]`; confidence has 3 digits and is at least 0.001.
    """
    exact = np.asarray(trace.confidence, np.float64)
    confidence = np.where(exact > 0, np.maximum(exact.round(3), 0.001), 0).tolist()
    frames = [
        list(zip(cells(tokens), row, strict=True))
        for tokens, row in zip(np.asarray(trace.tokens).tolist(), confidence, strict=True)
    ]
    steps = [
        [[place, *now] for place, (before, now) in enumerate(zip(*pair, strict=True)) if before != now]
        for pair in itertools.pairwise(frames)
    ]
    while len(steps) > num_steps and not steps[-1]:
        steps.pop()
    return {"tokens": [text for text, _ in frames[0]], "given": np.flatnonzero(~written).tolist(), "steps": steps}


def frames(trace: Mapping[str, Any]) -> Iterator[Frame]:
    """Yields the whole text before the first step and after each one, from the result of `compact`."""
    frame = [(text, 0.0) for text in trace["tokens"]]
    yield list(frame)
    for changes in trace["steps"]:
        for place, text, confidence in changes:
            frame[place] = (text, confidence)
        yield list(frame)


def texts(trace: Mapping[str, Any]) -> list[str]:
    """Returns the same as `frames`, without the confidences."""
    return ["".join(text for text, _ in frame) for frame in frames(trace)]


def show(records: Iterable[Mapping[str, Any]], console: rich.console.Console) -> None:
    """Prints the decoding of records, step below step; the more confident a token, the greener it is.

    New text is underlined; given and unwritten text is dim. Steps that change no text share a line; if there are many
    lines, only some are shown.
    """
    console.print("0 is before the first step. ¶ is the end of a text, · padding, ▢ MASK.", style="dim")
    for record in records:
        title = rich.text.Text(sign(record["inputs_pretokenized"]), "bold")
        title.append(" → ", "dim").append(sign(record["prediction"]), "bold green")
        console.print("", title, sep="\n")
        for line in _lines(record["trace"]):
            console.print(line, no_wrap=True, overflow="ellipsis")


def _lines(trace: Mapping[str, Any]) -> Iterator[rich.text.Text]:
    steps = itertools.groupby(enumerate(frames(trace)), lambda step: [text for text, _ in step[1]])
    groups = [list(group) for _, group in steps]
    labels = [f"{group[0][0]}–{group[-1][0]}" if len(group) > 1 else str(group[0][0]) for group in groups]
    given, before = set(trace["given"]), groups[0][-1][1]
    for chosen in np.unique(np.linspace(0, len(groups) - 1, _MOST_LINES).round().astype(int)).tolist():
        frame = groups[chosen][-1][1]
        line = rich.text.Text().append(f"{labels[chosen]:>{max(map(len, labels))}} ", "dim")
        for place, (text, confidence) in enumerate(frame):
            style = "dim" if place in given or not confidence else colour(confidence)
            line.append(sign(text), f"{style} underline" if text != before[place][0] else style)
        yield line
        before = frame


def colour(confidence: float) -> str:
    """Returns a colour from orange (unsure) to green (sure)."""
    return _COLOURS[min(int(confidence * len(_COLOURS)), len(_COLOURS) - 1)]


def sign(text: str) -> str:
    """Returns a text as a terminal may show it: all kinds of spaces unchanged, symbols for control characters."""
    plain = "".join(" " if unicodedata.category(character) == "Zs" else character for character in text)
    return terminal.signs(plain)
