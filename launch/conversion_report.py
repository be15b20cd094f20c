"""The report on the routes of launch/conversion.py: tables in Markdown, charts as SVG, intervals over seeds."""

import dataclasses
import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import route_advisor
from intervals import interval
from route_advisor import Candidate

from diffusion_t5x.reporting import charts
from diffusion_t5x.reporting.charts import Line

AUTOREGRESSIVE = ("one by one", "self-speculation", "drafts")  # decoders that write what an autoregressive model does


@dataclasses.dataclass(frozen=True)
class Point:
    """The drawn metric of a student after some steps, and the cost so far: tokens read, FLOPs."""

    route: str
    seed: int
    step: int
    tokens: float
    flops: float
    value: float


@dataclasses.dataclass(frozen=True)
class Score:
    """All metrics of a finished student, by name."""

    route: str
    seed: int
    decoder: str
    metrics: Mapping[str, float]


def curve(model_dir: pathlib.Path, task: str, metric: str) -> dict[int, float]:
    """Returns the metric at each evaluation of a training run, by step; empty if nothing was decoded."""
    path = model_dir / "inference_eval" / task / "metrics.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return {line["step"]: line[metric] for line in lines}


def tokens_a_step(model_dir: pathlib.Path) -> float:
    """Returns the mean number of tokens per step over a training run, without padding."""
    lines = map(json.loads, (model_dir / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return statistics.mean(line["tokens_per_second"] * line["seconds_per_step"] for line in lines)


def write(
    output: pathlib.Path,
    metrics: Sequence[str],
    scores: Sequence[Score],
    points: Sequence[Point],
    *,
    lower_is_better: bool = False,
    budget: float | None = None,
    tokens_per_pass: float | None = None,
) -> None:
    """Writes report.md and its charts.

    Args:
      output: the folder.
      metrics: the table's columns; the first one is drawn, and advice is by it.
      scores: of finished students.
      points: on the way there.
      lower_is_better: of the first metric.
      budget, tokens_per_pass: as `route_advisor.table` takes them.
    """
    costs = {}
    for route, found in _grouped(points, lambda point: point.route).items():
        last = max(found, key=lambda point: point.tokens)
        costs[route] = [f"{last.tokens / 1e6:.2f}", f"{last.flops / 1e12:.1f}"]
    rows = []
    for (route, decoder), found in _grouped(scores, lambda score: (score.route, score.decoder)).items():
        cells = []
        for metric in metrics:
            values = [score.metrics[metric] for score in found]
            mean, low, _ = interval(values)
            digits = 1 if abs(mean) >= 10 else 3
            cells.append(f"{mean:.{digits}f}" + (f" ± {mean - low:.{digits}f}" if len(values) > 1 else ""))
        rows.append([route, decoder, *cells, *costs.get(route, ["", ""])])
    head = ["route", "decoding", *metrics, "million tokens", "TFLOP"]
    lines = [" | ".join(head), " | ".join(["---"] * 2 + ["---:"] * (len(head) - 2)), *map(" | ".join, rows)]
    text = "\n".join(f"| {line} |" for line in lines) + "\n"
    drafting = [score for score in scores if "acceptance" in score.metrics]
    for (route, decoder), found in _grouped(drafting, lambda score: (score.route, score.decoder)).items():
        mean, low, _ = interval([score.metrics["acceptance"] for score in found])
        text += f"\n{route}, {decoder}: {mean:.1%} ± {mean - low:.1%} of the drafted tokens were accepted.\n"
    if candidates := _candidates(metrics[0], scores, points):
        limits = {"budget": budget, "tokens_per_pass": tokens_per_pass}
        advice = route_advisor.table(candidates, lower_is_better=lower_is_better, **limits)
        text += f"\nWhich route to take, by {metrics[0]}:\n\n{advice}"
    (output / "report.md").write_text(text, encoding="utf-8")
    for name, svg in drawn(metrics[0], scores, points).items():
        (output / f"{name}.svg").write_text(charts.standalone(svg), encoding="utf-8")


def _candidates(metric: str, scores: Sequence[Score], points: Sequence[Point]) -> list[Candidate]:
    """Returns what the advice chooses from: every route whose cost is known, with each decoding setting."""
    flops = {route: max(point.flops for point in found) for route, found in _grouped(points, lambda p: p.route).items()}
    return [
        Candidate(
            route,
            decoder,
            flops[route] / 1e12,
            statistics.mean(score.metrics["tokens_per_step"] for score in found),
            {score.seed: score.metrics[metric] for score in found},
        )
        for (route, decoder), found in _grouped(scores, lambda score: (score.route, score.decoder)).items()
        if route in flops
    ]


def drawn(metric: str, scores: Sequence[Score], points: Sequence[Point]) -> dict[str, str]:
    """Draws the metric over training tokens, over training FLOPs, and over tokens per pass in decoding.

    If AR2Diff_N was run for several N, also over N.
    """

    def lines(x: Callable[[Point], float]) -> list[Line]:
        found = []
        for number, (route, own) in enumerate(_grouped(points, lambda point: point.route).items()):
            steps = _grouped(own, lambda point: point.step)
            intervals = [interval([point.value for point in steps[step]]) for step in sorted(steps)]
            xs = [statistics.mean(map(x, steps[step])) for step in sorted(steps)]
            xy = list(zip(xs, [mean for mean, _, _ in intervals], strict=True))
            found.append(Line(route, number, xy, [(low, high) for _, low, high in intervals], marker="o"))
        return found

    name = metric.replace("_", " ")
    by_decoder = []
    for number, (label, own) in enumerate(_grouped(scores, _label).items()):
        means = [
            tuple(statistics.mean(score.metrics[x] for score in found) for x in ("tokens_per_step", metric))
            for found in _grouped(own, lambda score: score.decoder).values()
        ]
        by_decoder.append(Line(label, number, sorted(means), marker="o"))
    found = {
        "tokens": charts.line_chart(f"{name} and training", "million tokens", name, lines(lambda p: p.tokens / 1e6)),
        "flops": charts.line_chart(f"{name} and its cost", "TFLOP", name, lines(lambda p: p.flops / 1e12)),
        "passes": charts.line_chart(f"{name} and speed", "tokens a pass", name, by_decoder),
    }
    adapted = [score for score in scores if re.fullmatch(r"ar2diff_\d+", score.route)]
    by_steps = []
    for number, (decoder, own) in enumerate(_grouped(adapted, lambda score: score.decoder).items()):
        steps = _grouped(own, lambda score: int(score.route.rpartition("_")[2]))
        intervals = {step: interval([score.metrics[metric] for score in steps[step]]) for step in sorted(steps)}
        xy, bands = [(step, mean) for step, (mean, _, _) in intervals.items()], [x[1:] for x in intervals.values()]
        by_steps.append(Line(decoder, number, xy, bands, marker="o"))
    if by_steps and len(by_steps[0].points) > 1:
        title = f"AR2Diff_N: {name} and adaptation"
        found["adapted"] = charts.line_chart(title, "N, steps on the pretraining data", name, by_steps)
    return found


def _label(score: Score) -> str:
    """Returns the label of a score; a student that decodes in two modes has one for each."""
    return f"{score.route}, AR" if score.decoder in AUTOREGRESSIVE else score.route


def _grouped(values: Iterable, key: Callable) -> dict:
    groups: dict = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return groups
