"""Renders a trace as an animated SVG without scripts, for a README: the canvas at each step, in a loop.

The animation is CSS. It follows the reader's light or dark mode and shows only the last step to readers who
prefer reduced motion.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.cells
from markupsafe import escape

from diffusion_t5x.evaluation.traces import frames, sign

_SECONDS_PER_STEP, _SECONDS_AT_END = 0.7, 3.0
_WIDTH, _MARGIN = 720, 20  # pixels, as all that follows
_CHARACTER, _LINE, _PAD = 9.7, 30, 3  # of a monospaced font of 16 pixels
_MASK = "▢"  # how `vocabularies.visible` writes it
_STYLE = """
svg { background: #fff; font: 16px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
text { fill: #1c2024; white-space: pre; }
.note { fill: #5b636c; font-size: 13px; }
text.empty { fill: #a9b1b9; }
rect.empty { fill: #e3e7ea; }
.new { fill: #ffe08a; }
.s { animation-duration: %(seconds)gs; animation-timing-function: step-end; animation-iteration-count: infinite; }
@media (prefers-color-scheme: dark) {
  svg { background: #14171a; }
  text { fill: #e4e7ea; }
  .note { fill: #a0a8b0; }
  text.empty { fill: #59626b; }
  rect.empty { fill: #2b3137; }
  .new { fill: #6b5300; }
}
@media (prefers-reduced-motion: reduce) { .s { animation: none; } }
"""


@dataclasses.dataclass(frozen=True)
class _Cell:
    """A token's place: its left edge, its line and its width in pixels."""

    x: float
    line: int
    width: float


def animate(record: Mapping[str, Any]) -> str:
    """Returns the SVG of a record of `infer --trace`: its input, its canvas step by step, and the step number."""
    canvas = [[(sign(text), confidence) for text, confidence in frame] for frame in frames(record["trace"])]
    last = max((step for step in range(1, len(canvas)) if canvas[step] != canvas[step - 1]), default=0)
    canvas = canvas[: last + 1]
    cells = _layout([max(rich.cells.cell_len(frame[place][0]) for frame in canvas) for place in range(len(canvas[0]))])
    seconds = last * _SECONDS_PER_STEP + _SECONDS_AT_END
    top = 40
    intervals: set[tuple[int, int]] = set()
    body: list[str] = []
    prompt = sign(str(record.get("template") or record.get("inputs_pretokenized") or ""))
    if prompt:
        for line in _wrap(prompt):
            body.append(f'<text x="{_MARGIN}" y="{top}">{escape(line)}</text>')
            top += 24
        top += 20
    for place, cell in enumerate(cells):
        y = top + cell.line * _LINE
        values = [frame[place] for frame in canvas]
        for first, end in _runs(values):
            text, confidence = values[first]
            rect = f'x="{cell.x - _PAD / 2:g}" y="{y - 18}" width="{cell.width - _PAD / 2:g}" height="25" rx="3"'
            if first:
                body.append(f"<rect {rect} {_shown(first, first + 1, last, intervals, 'new')}/>")
            is_empty = not confidence and place not in record["trace"]["given"]
            visible = _shown(first, end, last, intervals, "empty" if is_empty else "")
            if is_empty and text == _MASK:
                body.append(f"<rect {rect} {visible}/>")
            else:
                body.append(f'<text x="{cell.x:g}" y="{y}" {visible}>{escape(text)}</text>')
    height = top + cells[-1].line * _LINE + 50
    for step in range(last + 1):
        at = f'x="{_MARGIN}" y="{height - 16}"'
        body.append(f"<text {at} {_shown(step, step + 1, last, intervals, 'note')}>step {step} of {last}</text>")
    keyframes = "\n".join(_keyframes(first, end, last, seconds) for first, end in sorted(intervals))
    title = escape(f"A denoising canvas: {record['prediction']!r} in {last} steps")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img"><title>{title}</title>\n<style>{_STYLE % {"seconds": seconds}}{keyframes}\n</style>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _layout(widths: Sequence[int]) -> list[_Cell]:
    """Returns the place of each token, given its maximum number of characters; lines break between tokens."""
    cells, x, line = [], float(_MARGIN), 0
    for characters in widths:
        width = characters * _CHARACTER + _PAD
        if x + width > _WIDTH - _MARGIN and x > _MARGIN:
            x, line = float(_MARGIN), line + 1
        cells.append(_Cell(x, line, width))
        x += width
    return cells


def _wrap(text: str) -> Iterator[str]:
    """Wraps the text into lines that fit the picture."""
    longest = int((_WIDTH - 2 * _MARGIN) / _CHARACTER)
    for start in range(0, len(text), longest):
        yield text[start : start + longest]


def _runs(values: Sequence[tuple[str, float]]) -> Iterator[tuple[int, int]]:
    """Yields the steps `[first, end)` over which a place keeps its text."""
    first = 0
    for step in range(1, len(values) + 1):
        if step == len(values) or values[step][0] != values[first][0]:
            yield first, step
            first = step


def _shown(first: int, end: int, last: int, intervals: set[tuple[int, int]], kind: str) -> str:
    """Returns the attributes of an element that is visible at the steps `[first, end)` only."""
    if first == 0 and end > last:
        return f'class="{kind}"'
    intervals.add((first, end))
    still = 1 if end > last and kind != "new" else 0
    classes = f"{kind} s".strip()
    return f'class="{classes}" opacity="{still}" style="animation-name: v{first}-{end}"'


def _keyframes(first: int, end: int, last: int, seconds: float) -> str:
    def percent(step: int) -> str:
        return f"{100 * step * _SECONDS_PER_STEP / seconds:.2f}%"

    frames = [f"{percent(0)} {{ opacity: {int(first == 0)} }}"]
    if first:
        frames.append(f"{percent(first)} {{ opacity: 1 }}")
    if end <= last:
        frames.append(f"{percent(end)} {{ opacity: 0 }}")
    frames.append(f"100% {{ opacity: {int(end > last)} }}")
    return f"@keyframes v{first}-{end} {{ {' '.join(frames)} }}"
