"""Charts of how time and memory grow: one of each for an axis, a line for each objective and decoder."""

from collections.abc import Sequence

from diffusion_t5x.performance.growth import Growth
from diffusion_t5x.reporting import charts
from diffusion_t5x.reporting.charts import Chart, Line


def growth_charts(runs: Sequence[tuple[str, Sequence[Growth]]]) -> dict[str, Chart]:
    """Draws seconds and GiB over each size that grew, log-log.

    Args:
      runs: names and measurements of the runs; runs without any are left out.

    Returns:
      Charts by file name, without the extension.
    """
    measured = [(run if len(runs) > 1 else "", line) for run, lines in runs for line in lines]
    drawn = {}
    for axis in dict.fromkeys(line.axis for _, line in measured):
        own = [(run, line) for run, line in measured if line.axis == axis]
        times = [_line(number, run, line, line.medians) for number, (run, line) in enumerate(own)]
        memory = [
            _line(number, run, line, [peak / 2**30 for peak in line.peak_bytes])
            for number, (run, line) in enumerate(own)
        ]
        for unit, name, lines in (("seconds", "time", times), ("GiB", "memory", memory)):
            svg = charts.line_chart(f"{name} over {axis}", axis, unit, lines, log_x=True, log_y=True)
            drawn[f"growth_{axis}_{name}"] = Chart(svg, "")
    return drawn


def _line(number: int, run: str, growth: Growth, values: Sequence[float]) -> Line:
    label = f"{run}: {growth.name}" if run else growth.name
    points = [(float(size), value) for size, value in zip(growth.sizes, values, strict=True)]
    return Line(f"{label}, {growth.kind}", number, points, marker="o")
