"""Functions with which gin files register tasks and mixtures; each replaces an earlier one of that name."""

import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from diffusion_t5x.data import libraries
from diffusion_t5x.data.vocabulary_files import vocabulary
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.tasks import preprocessors as pretraining

if TYPE_CHECKING:
    import seqio

MetricFn = Callable[[Sequence[Any], Sequence[str]], Mapping[str, float]]
Preprocessor = Callable[..., Any]  # the last returns a tf.data.Dataset


class Source(libraries.Source, Protocol):
    """A task's source of records."""

    def in_seqio(self) -> "seqio.DataSource":
        """SeqIO's source."""


def task(
    name: str,
    source: Source,
    preprocessors: Sequence[Preprocessor],
    vocabulary_file: str | None,
    *,
    has_inputs: bool = True,
    objective: Preprocessor | None = None,
    num_shots: int = 0,
    metric_fns: Sequence[MetricFn] = (),
    postprocess_fn: Callable[..., Any] | None = None,
    shuffle_buffer: int = 1_000,
    inputs_end: bool = True,
    has_rejected: bool = False,
) -> str:
    """Registers a task of texts and returns its name. Nothing is read yet.

    Args:
      name: name of the task.
      source: source of the records.
      preprocessors: convert records to texts `inputs` and `targets`, or only `targets`.
      vocabulary_file: see `vocabulary`.
      has_inputs: True if there are `inputs`.
      objective: pretraining objective, which converts tokens to `inputs` and `targets` (see `tasks.preprocessors`).
        Without one, features that are longer than the model's lengths are cut to their first tokens and EOS.
      num_shots: number of examples of the split "train" before the inputs of every example in other splits, always the
        same ones: each one's inputs and targets on a line each, with an empty line between examples.
      metric_fns: SeqIO's metrics.
      postprocess_fn: SeqIO's, for the metrics.
      shuffle_buffer: number of examples in the shuffle buffer; 1 for a source that shuffles by itself.
      inputs_end: inputs end in EOS. Targets do, unless the objective ends documents itself.
      has_rejected: there are texts `rejected`, each a worse one than the targets for the same inputs.

    Raises:
      UserError: there is no vocabulary file; shots of a task without inputs or training examples; on first reading,
        more shots than training examples.
    """
    if not isinstance(num_shots, int) or num_shots < 0:
        raise UserError(f"NUM_SHOTS must be a number of examples, 0 or more, not {num_shots!r}.")
    if num_shots and (not has_inputs or "train" not in source.splits):
        raise UserError(f"{name} cannot have shots: they take inputs and targets of a split 'train'.")
    known = vocabulary(vocabulary_file)

    def make() -> dict[str, Any]:
        import seqio

        from diffusion_t5x.data.seqio_vocabularies import in_seqio
        from diffusion_t5x.tasks.seqio_sources import Shots

        found, prepare, buffer = source.in_seqio(), list(preprocessors), shuffle_buffer
        if num_shots:
            found = Shots(found, num_shots, prepare, prepare, eval_on_fixed_exemplars=True)
            prepare = [functools.partial(seqio.experimental.fewshot_preprocessor, targets_prefix="\n")]
        ends = {"inputs": inputs_end, "targets": True, "rejected": True}
        if getattr(objective, "ends_documents", False):
            ends = dict.fromkeys(ends, False)
        if objective is None:
            steps = [pretraining.tokenize, seqio.preprocessors.append_eos_after_trim]
        else:
            tokenize = functools.partial(pretraining.tokenize, copy_pretokenized=False)
            steps = [tokenize, objective, seqio.preprocessors.append_eos]
            buffer = max(shuffle_buffer, pretraining.SHUFFLE_BUFFER)
        names = [key for key in ("inputs", "targets") if has_inputs or objective or key == "targets"]
        names += ["rejected"] if has_rejected else []
        return {
            "source": found,
            "preprocessors": [*prepare, *steps],
            "output_features": {name: seqio.Feature(in_seqio(known), add_eos=ends[name]) for name in names},
            "metric_fns": list(metric_fns),
            "postprocess_fn": postprocess_fn,
            "shuffle_buffer_size": buffer,
        }

    add(name, make)
    libraries.sources[name] = source
    return name


def add(name: str, make: Callable[[], Mapping[str, Any]]) -> str:
    """Registers a task, replacing any task or mixture of that name, when SeqIO is needed, and returns the name.

    Args:
      name: the task's name.
      make: returns the other arguments of `seqio.TaskRegistry.add`.

    Raises:
      UserError: SeqIO does not accept the name.
    """
    _check_name(name)
    libraries.sources.pop(name, None)

    def register(seqio: types.ModuleType) -> None:
        arguments = make()
        _remove(seqio, name)
        seqio.TaskRegistry.add(name, **arguments)

    libraries.when_needed(register)
    return name


def mixture(name: str, tasks: Sequence[tuple[str, float | Callable[..., float]]]) -> str:
    """Registers a mixture of registered tasks or mixtures and returns its name.

    Args:
      name: name of the mixture.
      tasks: names and rates, or functions from a task to its rate, called when the task is read. A task provides a
        share of its rate over the sum of rates.

    Raises:
      UserError: SeqIO does not accept the name, there are no tasks, or a rate is not positive; when the mixture is
        needed, a task is not registered.
    """
    _check_name(name)
    libraries.sources.pop(name, None)
    for part, rate in tasks:
        if not callable(rate) and rate <= 0:
            raise UserError(f"The rate of {part!r} in the mixture {name!r} must be positive, not {rate}.")
    if not tasks:
        raise UserError(f"The mixture {name!r} has no tasks.")

    def register(seqio: types.ModuleType) -> None:
        known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} - {name}
        for part, _ in tasks:
            if part not in known:
                hint = did_you_mean(part, known)
                raise UserError(f"The mixture {name!r} names {part!r}, which is not registered.{hint}")
        _remove(seqio, name)
        seqio.MixtureRegistry.add(name, list(tasks))

    libraries.when_needed(register)
    return name


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.:#]+", name):
        proposed = re.sub(r"[^\w.:#]+", "_", name) or "my_task"
        raise UserError(
            f"{name!r} cannot be a task's name: it may have letters, digits and . : _ # only. Set, for instance, "
            f"TASK_NAME = {proposed!r}."
        )


def _remove(seqio: types.ModuleType, name: str) -> None:
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        if name in registry.names():
            registry.remove(name)
