"""growth.json: how the time and memory of training and decoding grow with sizes, as exponents."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.markup
import rich.table
from scipy import special

FILE = "growth.json"


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Returns the slope of the least-squares line through log(value) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclasses.dataclass(frozen=True)
class Growth:
    """The measurements of one objective or decoder over one axis.

    Attributes:
      name: its name.
      kind: "training step" or "decoding".
      axis: the size that grew, see `growth_benchmark`.
      sizes: its values.
      seconds: seconds of each turn, by size.
      peak_bytes: memory of a device as planned by XLA, by size.
      flops: FLOPs by formula, over all devices, by size; None if there is no formula.
    """

    name: str
    kind: str
    axis: str
    sizes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    peak_bytes: tuple[int, ...]
    flops: tuple[int, ...] | None

    @property
    def medians(self) -> list[float]:
        """Median seconds by size."""
        return [statistics.median(turns) for turns in self.seconds]

    @property
    def time_exponents(self) -> list[float]:
        """The exponent of the time in each turn; empty for a single size."""
        return [exponent(self.sizes, turn) for turn in zip(*self.seconds, strict=True)] if self.sizes[1:] else []

    def at_the_end(self, values: Sequence[float]) -> float | None:
        """Returns the exponent between the two largest sizes, where fixed costs count least."""
        return exponent(self.sizes[-2:], values[-2:]) if self.sizes[1:] else None

    def over_all(self, values: Sequence[float]) -> float | None:
        """Returns the exponent over all sizes."""
        return exponent(self.sizes, values) if self.sizes[1:] else None

    def record(self) -> dict[str, Any]:
        """Returns the record as a JSON-serialisable dict."""
        return dataclasses.asdict(self) | {
            "seconds_median": self.medians,
            "time_exponents": self.time_exponents,
            "time_exponent_at_the_end": self.at_the_end(self.medians),
            "memory_exponent": self.over_all(self.peak_bytes),
            "memory_exponent_at_the_end": self.at_the_end(self.peak_bytes),
            "flops_exponent": self.flops and self.over_all(self.flops),
            "flops_exponent_at_the_end": self.flops and self.at_the_end(self.flops),
        }


def read(report: Mapping[str, Any]) -> list[Growth]:
    """Returns what is in a growth.json."""
    names = [field.name for field in dataclasses.fields(Growth)]
    found = []
    for record in report["growth"]:
        values: dict[str, Any] = {name: record[name] for name in names}
        values |= {name: tuple(x) for name, x in values.items() if isinstance(x, list)}
        found.append(Growth(**values | {"seconds": tuple(map(tuple, values["seconds"]))}))
    return found


def exponent_text(growth: Growth) -> str:
    """Returns the exponent of the time over all sizes: mean and half-width of the 95 % interval over turns (t)."""
    found = growth.time_exponents
    if not found:
        return "–"
    text = f"{statistics.mean(found):.2f}"
    if found[1:]:
        text += f" ± {special.stdtrit(len(found) - 1, 0.975) * statistics.stdev(found) / math.sqrt(len(found)):.2f}"
    return text


COLUMNS = ("sizes", "ms", "GiB", "time: exponent", "at the end", "formula", "at the end", "memory", "at the end")


def cells(line: Growth) -> list[str]:
    """Returns a table's cells about one objective or decoder, for `COLUMNS`."""

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    medians, peaks, flops = line.medians, line.peak_bytes, line.flops
    return [
        f"{line.sizes[0]:,}–{line.sizes[-1]:,}",
        f"{1000 * medians[0]:.3g}–{1000 * medians[-1]:.3g}",
        f"{peaks[0] / 2**30:.2g}–{peaks[-1] / 2**30:.2g}",
        exponent_text(line),
        shown(line.at_the_end(medians)),
        shown(line.over_all(flops) if flops else None),
        shown(line.at_the_end(flops) if flops else None),
        shown(line.over_all(peaks)),
        shown(line.at_the_end(peaks)),
    ]


def table(lines: Sequence[Growth], device: str) -> rich.table.Table:
    """Returns a table of one axis with a line for each objective and decoder."""
    found = rich.table.Table(box=rich.box.SIMPLE, title=rich.markup.escape(f"growth with {lines[0].axis}, {device}"))
    found.add_column("")
    for column in COLUMNS:
        found.add_column(column, justify="right")
    for line in lines:
        found.add_row(rich.markup.escape(f"{line.name}, {line.kind}"), *cells(line))
    return found
