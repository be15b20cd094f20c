"""Charts as inline SVG: equal data give equal bytes; colours come from the surrounding page.

Colours are CSS variables, so that a chart is readable on light and on dark ground: text and axes are `currentColor`,
series n is `--series-n`, the grid is `--grid`.
"""

import dataclasses
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

NUM_COLOURS = 7
# The variables, for light ground and for dark.
PALETTE = """:root {
  --grid: #e3e7ea; --series-0: #0067a8; --series-1: #c14a00; --series-2: #007a5a; --series-3: #a24388;
  --series-4: #8a6500; --series-5: #4f5bd5; --series-6: #5f6770;
}
@media (prefers-color-scheme: dark) {
  :root {
    --grid: #2b3137; --series-0: #56b4f0; --series-1: #ff8f52; --series-2: #3ccb9f; --series-3: #e694ca;
    --series-4: #e0b040; --series-5: #a3adff; --series-6: #b4bcc4;
  }
}"""
_GROUND = """svg { background: #fff; color: #1c2024; font-family: system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { background: #14171a; color: #e4e7ea; } }"""
_WIDTH, _HEIGHT = 420, 260  # points
_FONT_SIZE = 10
_LONGEST_LABEL = 24
_TEXT, _GRID = "#010000", "#020000"  # stand for the page's colours until the SVG is written
_SERIES = [f"#03000{n}" for n in range(NUM_COLOURS)]
_CSS = {_TEXT: "currentColor", _GRID: "var(--grid)"} | {c: f"var(--series-{n})" for n, c in enumerate(_SERIES)}
_STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffusion_t5x",
    "text.parse_math": False,  # names are shown as they are
    "font.size": _FONT_SIZE,
    "axes.titlesize": _FONT_SIZE + 1,
    "axes.labelsize": _FONT_SIZE,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      label: label at the line's end; "" for none.
      series: number of its colour; from `NUM_COLOURS` on colours repeat, dashed.
      points: `(x, y)`, by ascending x.
      band: `(low, high)` for each point; empty for none.
      marker: marker of the points, such as "o"; "" for a bare line.
    """

    label: str
    series: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    marker: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """An SVG and the text below it."""

    svg: str
    caption: str = ""


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    *,
    marks: Sequence[tuple[float, float]] = (),
    log_x: bool = False,
    log_y: bool = False,
    y_bounds: tuple[float, float] | None = None,
) -> str:
    """Draws lines with labels at their ends, as SVG.

    Args:
      title, x_label, y_label: texts, with the units of the axes.
      lines: lines with at least one point each.
      marks: points `(x, y)` with a ring around them.
      log_x: logarithmic x axis, with a tick at every x in the data.
      log_y: logarithmic y axis, if the values are positive and span a decade.
      y_bounds: minimum and maximum possible y, where the axis begins and ends. Without it, the axis of non-negative
        values does not go below 0.
    """
    with matplotlib.rc_context(_STYLE):
        labels = [shorten(line.label) for line in lines]
        figure, axes = _figure(title, right=_text_width(labels) + 16)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        values = [y for line in lines for _, y in line.points if math.isfinite(y)]
        if log_y and values and min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_yscale("log")
        if log_x:
            axes.set_xscale("log")
        for line in lines:
            x, y = zip(*line.points, strict=True)
            colour = _SERIES[line.series % NUM_COLOURS]
            style = "-" if line.series < NUM_COLOURS else "--"
            # Not clipped: a marker on the edge of a bounded axis is drawn whole.
            marker: dict[str, Any] = {"marker": line.marker, "markersize": 4.5, "clip_on": False}
            axes.plot(x, y, color=colour, linestyle=style, linewidth=1.5, **marker)
            if line.band:
                low, high = zip(*line.band, strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        for at_x, at_y in marks:
            axes.plot([at_x], [at_y], color=_TEXT, marker="o", markersize=9, markerfacecolor="none", zorder=3)
        _set_ticks(axes, sorted({x for line in lines for x, _ in line.points}) if log_x else None)
        axes.autoscale_view()  # the labels' heights depend on it
        if y_bounds:
            axes.set_ylim(*y_bounds)
        elif axes.get_yscale() == "linear" and values and min(values) >= 0:
            axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
        _label_ends(axes, lines, labels)
        return _svg(figure)


def interval_chart(
    title: str, x_label: str, rows: Sequence[tuple[str, float, float, float]], bounds: tuple[float, float] | None = None
) -> str:
    """Draws values with their intervals, `(label, value, low, high)`, one below the other, as SVG.

    Args:
      title, x_label: texts of the chart and its axis.
      rows: from top to bottom.
      bounds: minimum and maximum possible value, where the axis begins and ends.
    """
    with matplotlib.rc_context(_STYLE):
        labels = [shorten(row[0]) for row in rows]
        height = 70 + 24 * len(rows)
        figure, axes = _figure(title, right=16, left=_text_width(labels) + 16, height=height)
        for place, (_, value, low, high) in enumerate(rows):
            if bounds:
                value, low, high = (min(max(x, bounds[0]), bounds[1]) for x in (value, low, high))
            axes.plot([low, high], [place, place], color=_SERIES[0], linewidth=2.5, solid_capstyle="butt")
            axes.plot([value], [place], color=_SERIES[0], marker="o", markersize=6, clip_on=False)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.08)
        if bounds:
            axes.set_xlim(*bounds)
        elif all(low >= 0 for _, _, low, _ in rows):
            axes.set_xlim(left=max(0, axes.get_xlim()[0]))
        axes.grid(axis="y", visible=False)
        axes.spines.left.set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure)


def standalone(svg: str) -> str:
    """Returns a chart as a standalone file, with the palette in it."""
    style = f"<style>\n{PALETTE}\n{_GROUND}\n</style>"
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace(">", f">{style}", 1)


def shorten(label: str) -> str:
    """Shortens the label to one line that fits next to a chart, keeping both ends."""
    label = " ".join(label.split())
    half = _LONGEST_LABEL // 2
    return label if len(label) <= _LONGEST_LABEL else f"{label[: half - 1]}…{label[-half:]}"


def _figure(title: str, right: float, left: float = 58, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    axes = figure.add_axes((left / _WIDTH, 42 / height, (_WIDTH - left - right) / _WIDTH, (height - 42 - 26) / height))
    axes.set_title(title, loc="left", pad=12, x=-left / (_WIDTH - left - right) + 0.01)
    return figure, axes


def _text_width(labels: Sequence[str]) -> float:
    return 0.6 * _FONT_SIZE * max(map(len, labels), default=0)


def _set_ticks(axes: Axes, x_ticks: Sequence[float] | None) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1,) if high / low > 100 else (1, 2, 5)))
        else:
            axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    if x_ticks:
        axes.set_xticks(x_ticks)


def _label_ends(axes: Axes, lines: Sequence[Line], labels: Sequence[str]) -> None:
    """Writes each label to the right of the axes at the height of its line's end, without overlaps."""
    to_points = axes.transData.transform
    ends = [
        (to_points(line.points[-1])[1], line, label)
        for line, label in zip(lines, labels, strict=True)
        if label and math.isfinite(line.points[-1][1])
    ]
    ends.sort(key=lambda end: end[0])
    bottom, top = axes.bbox.y0, axes.bbox.y1
    gap = 1.25 * _FONT_SIZE
    heights: list[float] = []
    for height, _, _ in ends:
        heights.append(max(height, bottom, heights[-1] + gap if heights else bottom))
    ceiling = max(top, bottom + gap * (len(ends) - 1))
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], ceiling - gap * (len(heights) - 1 - place))
    for (_, line, label), height in zip(ends, heights, strict=True):
        colour = _SERIES[line.series % NUM_COLOURS]
        end_x, end_y = axes.transAxes.inverted().transform((axes.bbox.x1 + 10, height))
        axes.annotate(
            label,
            xy=line.points[-1],
            xytext=(end_x, end_y),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": colour,
                "linestyle": ":",
                "linewidth": 1,
                "shrinkA": 0,
                "shrinkB": 2,
            },
        )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has the fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="\w+">', "<g>", text)  # a page has many charts, and an id once
    text = re.sub(r"font-family: [^;\"]+", "font-family: inherit", text)
    return re.sub(r"(?<=: )#0[123]000\d", lambda match: _CSS[match[0]], text)
