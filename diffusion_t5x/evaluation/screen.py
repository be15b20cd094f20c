"""Formats an evaluation for the screen during training: scores with intervals, and two decoded examples."""

import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusion_t5x.console import Console, one_line

_LOG_WIDTH = 120  # of lines that go to a file or a pipe
_FIELDS = {"input": "inputs_pretokenized", "output": "prediction", "target": "targets_pretokenized"}


def evaluation_block(
    title: str,
    scores: Iterable[tuple[str, Mapping[str, float]]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    width: int | None = None,
) -> str:
    """Returns the scores of an evaluation by data set, and the first decoded examples, as indented lines with a title.

    Args:
      title: the first line.
      scores: names of data sets and their metrics; a name may occur several times.
      samples: predictions to show (see `inference.predict`), by data set.
      width: width of a line in characters; None is the terminal's, if standard error is a terminal.
    """
    width = width or (Console(stderr=True).width if sys.stderr.isatty() else _LOG_WIDTH)
    by_name: dict[str, dict[str, float]] = {}
    for name, metrics in scores:
        by_name.setdefault(name, {}).update(metrics)
    lines = [one_line(title, width)]
    for name, metrics in by_name.items():
        lines += [f"  {one_line(name, width - 2)}", *_wrapped(with_intervals(metrics), width)]
        for record in samples.get(name, ()):
            shown = {label: record[field] for label, field in _FIELDS.items() if field in record}
            lines += [f"    {label:8}{one_line(str(text), width - 12)}" for label, text in shown.items()]
    return "\n".join(lines)


def next_commands(model_dir: str, writes: bool, scored: bool) -> str:
    """Returns the commands to run on a MODEL_DIR after training.

    Args:
      model_dir: the run's folder.
      writes: True if its record has a decoder.
      scored: True if it was trained on a task with metrics.
    """
    verbs = [verb for verb, fits in (("generate", writes), ("eval", writes and scored)) if fits]
    commands = [f"  diffusion-t5x {verb} --checkpoint {shlex.quote(model_dir)}" for verb in verbs]
    return "\n".join([f"trained: {model_dir}", *(["next:"] if commands else []), *commands])


def with_intervals(metrics: Mapping[str, float]) -> list[str]:
    """Returns each metric as text; first those with a 95 % interval, `NAME_low` to `NAME_high` (see `metrics`)."""
    bounds = {name: (f"{name}_low", f"{name}_high") for name in metrics}
    bounds = {name: pair for name, pair in bounds.items() if all(bound in metrics for bound in pair)}
    within = {bound for pair in bounds.values() for bound in pair}
    texts = []
    for name in sorted(metrics, key=lambda name: name not in bounds):
        if name in bounds:
            low, high = (metrics[bound] for bound in bounds[name])
            texts.append(f"{name} {metrics[name]:.4g} [{low:.4g}, {high:.4g}]")
        elif name not in within:
            texts.append(f"{name} {metrics[name]:.4g}")
    return texts


def _wrapped(items: Sequence[str], width: int) -> list[str]:
    """Returns the items in lines, two spaces apart; a line breaks only between items."""
    joined = "  ".join(item.replace(" ", "\N{NO-BREAK SPACE}") for item in items)
    indent = " " * 4
    lines = textwrap.wrap(joined, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
