"""Functions with which gin files register tasks and mixtures; each replaces an earlier one of that name."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from diffusion_t5x.data.vocabulary_files import vocabulary
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.tasks import preprocessors as pretraining

MetricFn = Callable[[Sequence[Any], Sequence[str]], Mapping[str, float]]
Preprocessor = Callable[..., tf.data.Dataset]


def task(
    name: str,
    source: seqio.DataSource,
    preprocessors: Sequence[Preprocessor],
    vocabulary_file: str | None,
    *,
    has_inputs: bool = True,
    objective: Preprocessor | None = None,
    num_shots: int = 0,
    metric_fns: Sequence[MetricFn] = (),
    postprocess_fn: Callable[..., Any] | None = None,
    shuffle_buffer: int = 1_000,
) -> str:
    """Registers a task of texts and returns its name. Nothing is read.

    Args:
      name: of the task.
      source: of the records.
      preprocessors: from records to texts `inputs` and `targets`, or only `targets`.
      vocabulary_file: see `vocabulary`.
      has_inputs: whether there are `inputs`.
      objective: of pretraining, from tokens to `inputs` and `targets` (see `tasks.preprocessors`). Without one features
        longer than the model's lengths are cut: their first tokens are kept, and EOS.
      num_shots: so many examples of the split "train", the same ones for each example of other splits, stand before the
        inputs: each one's inputs and targets on a line each, an empty line between examples.
      metric_fns: SeqIO's metrics.
      postprocess_fn: SeqIO's, for what metrics read.
      shuffle_buffer: examples to shuffle among; 1 for a source that shuffles by itself.

    Raises:
      UserError: no vocabulary file; shots of a task without inputs or training examples; on first reading, more shots
        than training examples.
    """
    if not isinstance(num_shots, int) or num_shots < 0:
        raise UserError(f"NUM_SHOTS is a number of examples, 0 or more, not {num_shots!r}.")
    if num_shots:
        if not has_inputs or "train" not in source.splits:
            raise UserError(f"{name} cannot have shots: they take inputs and targets of a split 'train'.")
        source = _Shots(source, num_shots, preprocessors, preprocessors, eval_on_fixed_exemplars=True)
        preprocessors = [functools.partial(seqio.experimental.fewshot_preprocessor, targets_prefix="\n")]
    feature = seqio.Feature(vocabulary(vocabulary_file), add_eos=True)
    if objective is None:
        steps = [pretraining.tokenize, seqio.preprocessors.append_eos_after_trim]
    else:
        tokenize = functools.partial(pretraining.tokenize, copy_pretokenized=False)
        steps = [tokenize, objective, seqio.preprocessors.append_eos]
        shuffle_buffer = max(shuffle_buffer, pretraining.SHUFFLE_BUFFER)
    return add(
        name,
        source=source,
        preprocessors=[*preprocessors, *steps],
        output_features={key: feature for key in ("inputs", "targets") if has_inputs or objective or key == "targets"},
        metric_fns=list(metric_fns),
        postprocess_fn=postprocess_fn,
        shuffle_buffer_size=shuffle_buffer,
    )


class _Shots(seqio.experimental.FewshotDataSource):
    """SeqIO's source of examples with shots, each of them another training example."""

    def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
        available = self._original_source.get_dataset("train", shuffle=False).cardinality().numpy()
        if 0 <= available < self._num_shots:  # it is negative where SeqIO does not know it
            raise UserError(
                f"There are {available} training examples for {self._num_shots} shots: lower NUM_SHOTS, or give more."
            )
        return super().get_dataset(*args, **kwargs)


def add(name: str, **task: Any) -> str:
    """`seqio.TaskRegistry.add`, in place of an earlier task or mixture of that name, which it returns.

    Raises:
      UserError: a name that SeqIO does not take.
    """
    _check_name(name)
    _remove(name)
    seqio.TaskRegistry.add(name, **task)
    return name


def mixture(name: str, tasks: Sequence[tuple[str, float | Callable[[seqio.Task], float]]]) -> str:
    """Registers a mixture of registered tasks or mixtures and returns its name.

    Args:
      name: of the mixture.
      tasks: names and rates, or functions of a task that give its rate when it is read. Of n examples a task gives n
        times its rate over the sum of rates.

    Raises:
      UserError: a name that SeqIO does not take, no tasks, a task that is not registered, or a rate that is not
        positive.
    """
    _check_name(name)
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} - {name}
    for part, rate in tasks:
        if part not in known:
            raise UserError(f"The mixture {name!r} names {part!r}, which is not registered.{did_you_mean(part, known)}")
        if not callable(rate) and rate <= 0:
            raise UserError(f"The rate of {part!r} in the mixture {name!r} must be positive, not {rate}.")
    if not tasks:
        raise UserError(f"The mixture {name!r} has no tasks.")
    _remove(name)
    seqio.MixtureRegistry.add(name, list(tasks))
    return name


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.:#]+", name):
        proposed = re.sub(r"[^\w.:#]+", "_", name) or "my_task"
        raise UserError(
            f"{name!r} cannot be a task's name: it may have letters, digits and . : _ # only. Set, for instance, "
            f"TASK_NAME = {proposed!r}."
        )


def _remove(name: str) -> None:
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        if name in registry.names():
            registry.remove(name)
