"""Scores predictions with a task's metrics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import seqio


def score(task: "seqio.Task", records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns all metrics of the task by name.

    A metric function gets one postprocessed prediction per example, or a list of samples if it `takes_samples`.

    Args:
      task: the task, with its postprocessor and metric functions.
      records: per example, its fields, "prediction" (text) and, with several samples, "predictions".
    """
    targets = [task.postprocess_fn(r["targets_pretokenized"], example=r, is_target=True) for r in records]
    samples = [
        [
            task.postprocess_fn(text, example=record, is_target=False)
            for text in record.get("predictions", [record["prediction"]])
        ]
        for record in records
    ]
    scores: dict[str, float] = {}
    for metric in task.predict_metric_fns:
        scores |= metric(targets, samples if takes_samples(metric) else [first for first, *_ in samples])
    return scores


def check_metrics(metrics: Iterable[Callable[..., Mapping[str, float]]]) -> None:
    """Checks that metric functions can run on this machine, before the long work begins.

    A metric that cannot run everywhere has an attribute `check_here`: a function that raises a UserError if it cannot
    run here. It gets the keywords of a `functools.partial`.
    """
    for metric in metrics:
        check = getattr(getattr(metric, "func", metric), "check_here", None)
        if check is not None:
            check(**getattr(metric, "keywords", {}))


def takes_samples(metric: Callable[..., Mapping[str, float]]) -> bool:
    """True if a metric function, or that of a `functools.partial`, has the attribute `takes_samples = True`."""
    return getattr(getattr(metric, "func", metric), "takes_samples", False)
