"""The report about runs: learning curves, scores, decoded examples, canvases step by step, decode times.

The Markdown form has only the scores. Model outputs and names are untrusted: jinja2 escapes them (in Markdown the
filter `markdown`), matplotlib escapes them in charts, and the page's policy lets no script run.
"""

import difflib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jinja2
import markupsafe

import diffusion_t5x
from diffusion_t5x import records, terminal
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.metrics import warn_of_small_difference
from diffusion_t5x.evaluation.traces import texts
from diffusion_t5x.performance import growth
from diffusion_t5x.reporting import charts, shown
from diffusion_t5x.reporting.animation import animate
from diffusion_t5x.reporting.charts import Chart, Line
from diffusion_t5x.reporting.decode_charts import decode_charts
from diffusion_t5x.reporting.growth_charts import growth_charts
from diffusion_t5x.reporting.runs import Curve, Record, Run, Scores, read_runs

NUM_EXAMPLES = 20
NUM_TRACES = 8  # of each run
_FIRST_LINES = {
    "html": "<!doctype html><!-- diffusion_t5x report -->",
    "md": "<!-- diffusion_t5x report -->",
    "svg": "<!-- diffusion_t5x canvas -->",
}
_MARKERS = "os^Dv"
_MEANS = {"exact_match", "em", "f1", "math_accuracy", "pass@1"}  # over examples, in percent
_SHOWN = {  # metrics of learning, as regular expressions, with what is on the axis
    r"loss": "nats per target token",
    r"accuracy(_\d+)?": "share of target tokens",
    r"learning_rate": "learning rate",
    r"tokens_per_second": "tokens per second",
    r"reward|best_reward": "mean over a rollout",
}


def write_report(folders: Iterable[str | pathlib.Path], output: str | pathlib.Path, example: int = 0) -> pathlib.Path:
    """Writes one self-contained HTML file about the runs in `folders`; see `runs.read_runs` for how runs are found.

    Empty sections are left out. The same runs give the same bytes. If `output` ends in .md, it gets the score tables as
    Markdown; if it ends in .svg, an animation of one example's canvas.

    Args:
      folders: folders of runs.
      output: the file to write; its extension chooses the format.
      example: index of the traced example that an .svg shows, from 0.

    Raises:
      UserError: a folder or file is missing or broken, there is no such traced example, or `output` exists and is not
        an earlier report.
    """
    output = pathlib.Path(output)
    kind = output.suffix[1:] if output.suffix[1:] in _FIRST_LINES else "html"
    runs = read_runs(folders)
    page = _picture(runs, example) if kind == "svg" else render(runs, "md" if kind == "md" else "html")
    try:
        if output.exists() and not output.read_bytes().startswith(_FIRST_LINES[kind].encode()):
            raise UserError(f"{output} exists and is not a report: choose another --output.")
    except OSError as error:
        raise UserError(f"Cannot write {output}: {error.strerror}. Choose another --output.") from None
    records.write_text(output, page, errors="replace")
    return output


def render(runs: Sequence[Run], kind: Literal["html", "md"] = "html") -> str:
    """Returns the page about these runs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=kind == "html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": shown.number, "decoder": shown.decoder, "markdown": markdown}
    scores = _rows([(run.name, found) for run in runs for found in run.scores])
    data_sets = list(dict.fromkeys(found.data_set for _, found in scores))
    page: dict[str, Any] = {
        "first_line": markupsafe.Markup(_FIRST_LINES[kind]),
        "title": runs[0].name if len(runs) == 1 else f"Report on {len(runs)} runs",
        "tables": [
            score_table(data_set, [row for row in scores if row[1].data_set == data_set]) for data_set in data_sets
        ],
    }
    if kind == "html":
        page |= {
            "version": diffusion_t5x.__version__,
            "runs": [(run, list(_contents(run))) for run in runs],
            "learning": list(_learning(runs)),
            "examples": [examples_table(runs, data_set) for data_set in _predicted(runs)],
            "traces": list(_traces(runs)),
            "decode_times": [(run.name, time) for run in runs for time in run.decode_times],
            "decode_charts": list(decode_charts([(run.name, run.decode_times) for run in runs]).values()),
            "growth_columns": growth.COLUMNS,
            "growth": [(run.name, line, growth.cells(line)) for run in runs for line in run.growth],
            "growth_charts": list(growth_charts([(run.name, run.growth) for run in runs if run.growth]).values()),
            "palette": markupsafe.Markup(charts.PALETTE),
        }
    text = environment.get_template(f"report.{kind}").render(page)
    return terminal.safe(text) if kind == "md" else text


def _picture(runs: Sequence[Run], example: int) -> str:
    """Returns an example's canvas as an animated SVG."""
    traced = [record for run in runs for found in run.predictions for record in found.records if record.get("trace")]
    if not traced:
        raise UserError("These runs have no trace: run infer with --trace, then name its INFER_OUTPUT_DIR.")
    if not 0 <= example < len(traced):
        raise UserError(f"--example={example}: there are {len(traced)} traced examples, counted from 0.")
    return f"{_FIRST_LINES['svg']}\n{animate(traced[example])}"


def markdown(text: object) -> str:
    """Returns text for a cell of a Markdown table, with everything escaped that Markdown or HTML would interpret."""
    return " ".join(re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", str(text)).split())


def changes(before: str, after: str) -> list[tuple[str, bool]]:
    """Returns the pieces of `after`, each with True if it is new since `before`.

    If the two have less than half in common, like noise and text, their overlap is chance and everything is new.
    """
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    if matcher.ratio() < 0.5:
        return [(after, True)]
    pieces = ((after[start:end], tag != "equal") for tag, _, _, start, end in matcher.get_opcodes())
    return [piece for piece in pieces if piece[0]]


def canvases(trace: Sequence[str]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Returns the canvases of a trace with the new text in each; steps that change nothing are merged."""
    rows: list[tuple[int, int, list[tuple[str, bool]]]] = [(0, 0, [(trace[0], False)])]
    for step, (before, after) in enumerate(itertools.pairwise(trace), start=1):
        if before == after and step > 1:
            rows[-1] = (rows[-1][0], step, rows[-1][2])
        else:
            rows.append((step, step, changes(before, after)))
    return [(f"{first}" if first == last else f"{first}–{last}", pieces) for first, last, pieces in rows]


def score_table(data_set: str, rows: Sequence[tuple[str, Scores]]) -> Mapping[str, Any]:
    """Returns columns and rows of the scores on a data set, and a chart of each metric that has several intervals.

    The charts show each run's last checkpoint. Rows with published numbers of the same setting come last.
    """
    names = list(dict.fromkeys(name for _, scores in rows for name in scores.metrics))
    names = [name for name in names if not re.search("_(low|high)$", name)]
    drawn = []
    last = dict(rows)
    for name in names:
        intervals = [(run, *ends) for run, scores in last.items() if (ends := _interval(scores.metrics, name))]
        if len(intervals) > 1:
            svg = charts.interval_chart(
                name, f"{shown.unit(name)}, 95 % interval", intervals, bounds=shown.bounds(name)
            )
            drawn.append(Chart(svg))
    cells = [(run, scores, [_cell(scores.metrics, name) for name in names]) for run, scores in rows]
    warnings = [
        f"{name} of {one} and {other}: {warning}"
        for name in _MEANS & set(names)
        for (one, a), (other, b) in itertools.combinations(last.items(), 2)
        if a.num_examples and a.num_examples == b.num_examples and name in a.metrics and name in b.metrics
        if (warning := warn_of_small_difference(a.metrics[name], b.metrics[name], a.num_examples))
    ]
    published: dict[tuple[str, str], dict[str, float]] = {}
    for _, scores in rows:
        for paper, metric, value in scores.published:
            published.setdefault((paper.source, f"{paper.size}, {paper.method}"), {})[metric] = value
    papers = [(*which, [_cell(values, name) for name in names]) for which, values in published.items()]
    return {
        "data_set": data_set,
        "metrics": names,
        "rows": cells,
        "papers": papers,
        "warnings": sorted(warnings),
        "charts": drawn,
    }


def examples_table(runs: Sequence[Run], data_set: str) -> Mapping[str, Any]:
    """Returns examples of a data set side by side: the first ones, and the first that some run got wrong."""
    columns = [(run.name, found) for run in runs for found in run.predictions if found.data_set == data_set]
    rows: dict[tuple[Any, str, str], dict[int, str]] = {}
    for column, (_, found) in enumerate(columns):
        for record in found.records:
            inputs, targets = (_text(record, f"{side}_pretokenized") for side in ("inputs", "targets"))
            key = (record.get("example_id"), inputs, targets)
            rows.setdefault(key, {})[column] = _text(record, "prediction")

    def table(keys):
        return [(key[1], key[2], [rows[key].get(column) for column in range(len(columns))]) for key in keys]

    wrong = [key for key, predictions in rows.items() if any(text != key[2] for text in predictions.values())]
    return {
        "data_set": data_set,
        "columns": [(f"{name}, at its start" if found.at_start else name, found.decoder) for name, found in columns],
        "total": len(rows),
        "first": table(list(rows)[:NUM_EXAMPLES]),
        "num_wrong": len(wrong),
        "wrong": table(wrong[:NUM_EXAMPLES]),
    }


def _text(record: Record, name: str) -> str:
    return str(record.get(name, ""))


def _contents(run: Run) -> Iterator[str]:
    """Describes the contents of a run."""
    for curve in run.curves:
        if curve.kind == "train" and curve.points:
            yield f"trained to step {max(points[-1][0] for points in curve.points.values()):,}"
    if run.size:
        yield run.size
    for data_set in dict.fromkeys(scores.data_set for scores in run.scores):
        *earlier, scores = (scores for scores in run.scores if scores.data_set == data_set)
        what = _count(scores.num_examples, "example") if scores.num_examples is not None else "losses"
        step = "" if scores.step is None else f" at step {scores.step:,}"
        others = f" and {len(earlier)} earlier" if earlier else ""
        yield f"{data_set}: {what}, {scores.model}{step}{others}"
    if not run.scores:
        for found in run.predictions:
            yield f"{found.data_set}: {_count(len(found.records), 'prediction')}"
    if run.decode_times:
        lengths, labels = ({getattr(time, field) for time in run.decode_times} for field in ("length", "label"))
        yield f"decode times of {', '.join(sorted(labels))} at {_count(len(lengths), 'length')}"
    if run.growth:
        axes = ", ".join(dict.fromkeys(line.axis for line in run.growth))
        yield f"growth of {', '.join(dict.fromkeys(line.name for line in run.growth))} with {axes}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _learning(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yields charts of training with the losses on held-out data, of rewards, and of the scores of each data set."""
    runs = [run for run in runs if run.curves]
    metrics = sorted({name for run in runs for curve in run.curves for name in curve.points})
    kinds = "train", "training_eval", "rollout"
    for pattern, unit in _SHOWN.items():
        for metric in metrics:
            if re.fullmatch(pattern, metric):
                yield _learning_chart(runs, metric, metric, unit, lambda curve: curve.kind in kinds)
    decoded = [curve for run in runs for curve in run.curves if curve.kind == "inference_eval"]
    for data_set in dict.fromkeys(curve.data_set for curve in decoded):
        own = [curve for curve in decoded if curve.data_set == data_set]
        for metric in metrics:
            if not re.search("_(low|high|seconds)$", metric) and any(metric in curve.points for curve in own):
                title = f"{metric}, {data_set}"
                yield _learning_chart(runs, metric, title, shown.unit(metric), own.__contains__)


def _learning_chart(
    runs: Sequence[Run], metric: str, title: str, unit: str, is_drawn: Callable[[Curve], bool]
) -> Chart:
    curves = [(n, run, curve) for n, run in enumerate(runs) for curve in run.curves]
    curves = [(n, run, curve) for n, run, curve in curves if is_drawn(curve) and curve.points.get(metric)]
    data_sets = list(dict.fromkeys(curve.data_set for _, _, curve in curves if curve.task))
    markers = {name: _MARKERS[place % len(_MARKERS)] for place, name in enumerate(data_sets)}
    lines, labelled = [], set()
    for series, run, curve in curves:
        low, high = ([value for _, value in curve.points.get(f"{metric}_{end}", ())] for end in ("low", "high"))
        points = curve.points[metric]
        band = list(zip(low, high, strict=True)) if len(low) == len(high) == len(points) else ()
        label = "" if run.name in labelled else run.name
        labelled.add(run.name)
        lines.append(Line(label, series, points, band, markers.get(curve.data_set, "")))
    signs = ", ".join(f"{'●■▲◆▼'[_MARKERS.index(marker)]} {name}" for name, marker in markers.items())
    caption = f"Held-out data: {signs}." if signs else ""
    svg = charts.line_chart(title, "step", unit, lines, log_y=metric == "loss", y_bounds=shown.bounds(metric))
    return Chart(svg, caption)


def _interval(metrics: Mapping[str, float], name: str) -> tuple[float, float, float] | None:
    value, low, high = (metrics.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    return None if value is None or low is None or high is None else (value, low, high)


def _cell(metrics: Mapping[str, float], name: str) -> str | None:
    """Returns a metric with its interval as text; None if it was not measured."""
    if name not in metrics:
        return None
    interval = _interval(metrics, name)
    return shown.score(name, metrics[name], interval and interval[1:])


def _rows(scores: Sequence[tuple[str, Scores]]) -> list[tuple[str, Scores]]:
    """Returns each result once: equal scores of one run, checkpoint and settings are one row."""
    kept: dict[Any, tuple[str, Scores]] = {}
    for run, found in scores:
        metrics = frozenset((n, v) for n, v in found.metrics.items() if not n.endswith("_seconds"))
        kept.setdefault((run, found.data_set, found.model, found.step, found.decoder, metrics), (run, found))
    return list(kept.values())


def _predicted(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(found.data_set for run in runs for found in run.predictions if found.records))


def _traces(runs: Sequence[Run]) -> Iterator[tuple[str, str, list[tuple[Record, list]]]]:
    """Yields name, decoder and first examples of each run that kept canvases."""
    for run in runs:
        for found in run.predictions:
            traced = [record for record in found.records if record.get("trace")][:NUM_TRACES]
            if traced:
                yield run.name, found.decoder, [(record, canvases(texts(record["trace"]))) for record in traced]
