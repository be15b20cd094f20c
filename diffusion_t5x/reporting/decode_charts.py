"""Charts of decode times: a line for each decoder, a ring where it crosses the autoregressive one."""

from collections.abc import Sequence

from diffusion_t5x.performance.decode_times import DecodeTime, compare
from diffusion_t5x.reporting import charts
from diffusion_t5x.reporting.charts import Chart, Line


def decode_charts(runs: Sequence[tuple[str, Sequence[DecodeTime]]]) -> dict[str, Chart]:
    """Draws seconds per text over text length, log-log: a chart of fixed batches and one of saturating ones.

    Decoders are compared only within a run.

    Args:
      runs: names and times of the runs; runs without times are left out.

    Returns:
      Charts by file name, without the extension.
    """
    kinds = {"decode_time": ("decode time", False), "decode_time_saturating": ("with saturating batches", True)}
    chosen = {
        name: [(run, found) for run, times in runs if (found := [t for t in times if t.saturating == saturating])]
        for name, (_, saturating) in kinds.items()
    }
    return {name: _chart(kinds[name][0], found) for name, found in chosen.items() if found}


def _chart(title: str, runs: Sequence[tuple[str, Sequence[DecodeTime]]]) -> Chart:
    lines: list[Line] = []
    marks, sentences = [], []
    for run, times in runs:
        run_name = f"{run}: " if len(runs) > 1 else ""
        for label in dict.fromkeys(time.label for time in times):
            own = sorted((time for time in times if time.label == label), key=lambda time: time.length)
            lines.append(
                Line(
                    run_name + label,
                    len(lines),
                    [(time.length, time.seconds_per_text) for time in own],
                    [(min(time.seconds) / time.batch_size, max(time.seconds) / time.batch_size) for time in own],
                    marker="o",
                )
            )
        for sentence, points in compare(times):
            marks += points
            sentences.append(run_name + sentence)
    axes = "target length (tokens)", "seconds a text"
    svg = charts.line_chart(title, *axes, lines, marks=marks, log_x=True, log_y=True)
    return Chart(svg, " ".join(sentences))
