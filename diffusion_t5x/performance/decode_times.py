"""decode_time.json: decode times over lengths, saved after each measurement, and where decoders cross."""

import dataclasses
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.box
import rich.markup
import rich.table

from diffusion_t5x import records
from diffusion_t5x.console import Console
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.results import differences

FILE = "decode_time.json"
REFERENCE = "AutoregressiveDecoder"


@dataclasses.dataclass(frozen=True)
class DecodeTime:
    """Decode times of a decoder at one text length.

    Attributes:
      label: the decoder's name in its comparison.
      decoder: its class.
      settings: all its settings, as text.
      length: number of tokens in a text.
      batch_size: number of texts written at once.
      saturating: the batch size was searched: doubling it would hardly raise the tokens per second.
      forwards: number of model passes, not counting one that reads only the prompt.
      device: the device, and JAX's version.
      seconds: seconds of each run.
    """

    label: str
    decoder: str
    settings: str
    length: int
    batch_size: int
    saturating: bool
    forwards: int
    device: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)

    @property
    def seconds_per_text(self) -> float:
        return self.median / self.batch_size

    @property
    def ms_per_forward(self) -> float:
        return 1000 * self.median / self.forwards

    @property
    def tokens_per_forward(self) -> float:
        """Number of tokens per text and forward pass."""
        return self.length / self.forwards

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all texts together."""
        return self.batch_size * self.length / self.median

    def record(self) -> dict[str, Any]:
        """Returns the result as stored in the file: the fields and the figures derived from them."""
        figures = {
            "seconds_median": self.median,
            "seconds_min": min(self.seconds),
            "seconds_max": max(self.seconds),
            "ms_per_forward": self.ms_per_forward,
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_second": self.tokens_per_second,
        }
        return dataclasses.asdict(self) | figures


def read_times(report: Mapping[str, Any]) -> list[DecodeTime]:
    """Returns the times in a decode_time.json."""
    names = [field.name for field in dataclasses.fields(DecodeTime)]
    fields = [{name: record[name] for name in names} for record in report["times"]]
    return [DecodeTime(**found | {"seconds": tuple(found["seconds"])}) for found in fields]


class Measurements:
    """decode_time.json, rewritten atomically after each measurement; a later run continues from it.

    Args:
      folder: folder of the file.
      settings: everything that a time depends on, as a JSON-serialisable dict.
      machine: the machine, see `stopwatch.describe_machine`.

    Raises:
      UserError: the file has measurements with different settings or of another machine, or is broken.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any], machine: Mapping[str, Any]):
        self.path = pathlib.Path(folder, FILE)
        self._head = json.loads(json.dumps({"settings": settings, "machine": machine}))
        self._times: dict[tuple[str, int, bool], DecodeTime] = {}
        self._search: dict[tuple[str, int, int], float | None] = {}
        if not self.path.exists():
            return
        try:
            report = json.loads(self.path.read_bytes())
            before = {name: report[name] for name in self._head}
            self._times = {self._place(time): time for time in read_times(report)}
            self._search = {(*place, size): seconds for *place, size, seconds in report["search"]}
        except (ValueError, KeyError, TypeError):
            before = {}
        if changed := list(differences(before, self._head)):
            raise UserError(
                f"{self.path} has measurements with different settings ({', '.join(changed[:5])}). Choose another "
                "BENCHMARK_OUTPUT_DIR, or remove that file."
            )

    @staticmethod
    def _place(time: DecodeTime) -> tuple[str, int, bool]:
        return time.label, time.length, time.saturating

    @property
    def times(self) -> list[DecodeTime]:
        """All times, sorted by kind of batch (fixed or saturating) and by length."""
        return sorted(self._times.values(), key=lambda time: (time.saturating, time.length))

    def seconds(self, label: str, length: int, saturating: bool) -> tuple[float, ...]:
        """Returns the seconds of each timed run."""
        time = self._times.get((label, length, saturating))
        return time.seconds if time else ()

    def add(self, time: DecodeTime) -> None:
        """Saves a time; it replaces one with fewer runs."""
        self._times[self._place(time)] = time
        self._write()

    def searched(self, label: str, length: int) -> dict[int, float | None]:
        """Returns seconds by batch size from the search for the saturating one; None where memory ran out."""
        return {size: seconds for (*place, size), seconds in self._search.items() if place == [label, length]}

    def add_searched(self, label: str, length: int, size: int, seconds: float | None) -> None:
        self._search[label, length, size] = seconds
        self._write()

    def _write(self) -> None:
        search = [[*place, seconds] for place, seconds in self._search.items()]
        report = self._head | {"times": [time.record() for time in self.times], "search": search}
        records.write_json(self.path, report)


def crossings(a: Mapping[float, float], b: Mapping[float, float]) -> Iterator[tuple[float, float]]:
    """Yields points `(x, y)` where two curves y over x cross, interpolated linearly in log-log."""
    shared = sorted(a.keys() & b.keys())
    apart = [math.log(a[x] / b[x]) for x in shared]
    for n, (x, gap) in enumerate(zip(shared, apart, strict=True)):
        if gap == 0:
            yield x, a[x]
        elif n + 1 < len(shared) and gap * apart[n + 1] < 0:
            share = gap / (gap - apart[n + 1])
            behind = shared[n + 1]
            yield x * (behind / x) ** share, a[x] * (a[behind] / a[x]) ** share


def compare(times: Sequence[DecodeTime]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Compares each decoder with the autoregressive ones by seconds per text: a sentence, and the crossing points.

    Args:
      times: times of one machine and one kind of batch.
    """
    lines: dict[str, dict[float, float]] = {}
    for time in times:
        lines.setdefault(time.label, {})[time.length] = time.seconds_per_text
    references = list(dict.fromkeys(time.label for time in times if time.decoder == REFERENCE))
    for reference in references:
        for label, line in lines.items():
            shared = lines[reference].keys() & line.keys()
            if label in references or not shared:
                continue
            points = list(crossings(lines[reference], line))
            if points:
                where = " and ".join(f"{length:,.0f}" for length, _ in points)
                yield f"{label} takes as long as {reference} at {where} tokens.", points
            else:
                gains = [lines[reference][x] / line[x] for x in shared]
                word = "less" if gains[0] > 1 else "more"
                yield f"{label} takes {word} time than {reference} at every length measured.", []


def show(times: Sequence[DecodeTime]) -> None:
    """Prints a table for each kind of batch, and where decoders cross."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for saturating in sorted({time.saturating for time in times}):
        shown = [time for time in times if time.saturating == saturating]
        what = "saturating batches" if saturating else f"{shown[0].batch_size} at once"
        table = rich.table.Table(box=rich.box.SIMPLE, title=rich.markup.escape(f"{what}, {shown[0].device}"))
        table.add_column("decoder")
        for column in ("tokens", "batch", "forwards", "tokens/forward", "ms/forward", "seconds", "tokens/s"):
            table.add_column(column, justify="right")
        for n, time in enumerate(shown):
            seconds = f"{time.median:.3g} [{min(time.seconds):.3g}, {max(time.seconds):.3g}]"
            figures = (time.length, time.batch_size, time.forwards, f"{time.tokens_per_forward:.3g}")
            cells = (time.label, *figures, f"{time.ms_per_forward:.3g}", seconds, f"{time.tokens_per_second:.0f}")
            is_last = n + 1 == len(shown) or shown[n + 1].length != time.length
            table.add_row(*(rich.markup.escape(str(cell)) for cell in cells), end_section=is_last)
        console.print(table)
        for sentence, _ in compare(shown):
            console.print(sentence, markup=False, highlight=False)
