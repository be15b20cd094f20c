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
    pairs = [postprocessed(task, record, record.get("predictions", [record["prediction"]])) for record in records]
    targets, samples = ([pair[i] for pair in pairs] for i in range(2))
    scores: dict[str, float] = {}
    for metric in task.predict_metric_fns:
        scores |= values(metric, targets, samples)
    return scores


def values(
    metric: Callable[..., Mapping[str, Any]], targets: Sequence[Any], samples: Sequence[Sequence[Any]]
) -> dict[str, float]:
    """Returns the values of a metric function by name, those in SeqIO's `Scalar` as numbers.

    Args:
      metric: the function; it gets the first sample of each example, or all if it `takes_samples`.
      targets: each example's target.
      samples: each example's postprocessed predictions, at least one.
    """
    found = metric(targets, samples if takes_samples(metric) else [first for first, *_ in samples])
    return {name: getattr(value, "value", value) for name, value in found.items()}


def name_of(metric: Callable[..., Any]) -> str:
    """Returns the name of a metric function, or of that of a `functools.partial`."""
    function = getattr(metric, "func", metric)
    return getattr(function, "__name__", repr(function))


def postprocessed(task: "seqio.Task", example: Mapping[str, Any], texts: Sequence[str]) -> tuple[Any, list[Any]]:
    """Returns an example's target and texts as the task's metrics take them."""
    target = task.postprocess_fn(example["targets_pretokenized"], example=example, is_target=True)
    return target, [task.postprocess_fn(text, example=example, is_target=False) for text in texts]


def check_metrics(metrics: Iterable[Callable[..., Any]]) -> None:
    """Checks that metric functions (or rewards) can run on this machine, before the long work begins.

    One that cannot run everywhere has an attribute `check_here`: a function that raises a UserError if it cannot
    run here. It gets the keywords of a `functools.partial`.
    """
    for metric in metrics:
        check = getattr(getattr(metric, "func", metric), "check_here", None)
        if check is not None:
            check(**getattr(metric, "keywords", {}))


def takes_samples(metric: Callable[..., Mapping[str, float]]) -> bool:
    """True if a metric function, or that of a `functools.partial`, has the attribute `takes_samples = True`."""
    return getattr(getattr(metric, "func", metric), "takes_samples", False)
