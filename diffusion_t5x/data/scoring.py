"""A task's metrics of predictions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import seqio


def score(task: "seqio.Task", records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """All metrics of the task.

    A metric function sees one postprocessed prediction for each example; if it says so (see `takes_samples`), a list of
    them.

    Args:
      task: its postprocessor and metric functions are used.
      records: for each example what the task says of it, "prediction" (text) and, with several samples, "predictions".
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

    One that cannot run everywhere has an attribute `check_here`: a function that raises a UserError where it cannot. It
    gets the keywords of a `functools.partial`.
    """
    for metric in metrics:
        check = getattr(getattr(metric, "func", metric), "check_here", None)
        if check is not None:
            check(**getattr(metric, "keywords", {}))


def takes_samples(metric: Callable[..., Mapping[str, float]]) -> bool:
    """True if a metric function, or that of a `functools.partial`, has the attribute `takes_samples = True`."""
    return getattr(getattr(metric, "func", metric), "takes_samples", False)
