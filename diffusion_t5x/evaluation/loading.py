"""Prepares a verb's work: checks that data and model fit, and loads a model's parameters."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.checkpointing import restoring
from diffusion_t5x.checkpointing.assignment import Rule, named_leaves
from diffusion_t5x.checkpointing.checkpoints import AnyCheckpoint, OpenCheckpoint, open_checkpoint
from diffusion_t5x.checkpointing.start import check_start
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.dataset import Dataset
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.frozen import FrozenDefinition
from diffusion_t5x.models.quantized import FewBits
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.distillation import Teacher
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training import lora as lora_training
from diffusion_t5x.training.agreement import Agreement
from diffusion_t5x.training.rollout import Rollout


def check_datasets(datasets: Iterable[Dataset], model: ModelConfig, mesh: Mesh) -> None:
    """Raises a UserError if a data set is invalid, or its rows or batches do not fit the model or the mesh."""
    datasets = list(datasets)
    for dataset in datasets:
        if isinstance(dataset, SeqioDataset):
            dataset.check_files()  # of all, before the first of them imports SeqIO
    for dataset in datasets:
        dataset.check()
        if dataset.architecture != model.architecture:
            raise UserError(
                f"{dataset.name} is laid out for the architecture {dataset.architecture}, but ModelConfig.architecture "
                f"is {model.architecture}: set both by including models/{model.architecture}.gin."
            )
        model.check_length(dataset.row_length, f"task_feature_lengths of {dataset.name}")
        partitioning.check_batch(mesh, dataset.batch_size, dataset.row_length)


def load_teacher(
    path: AnyCheckpoint,
    config: ModelConfig,
    vocabulary: TokenIds,
    mesh: Mesh,
    setting: str,
    allow_mismatch: bool,
    few_bits: FewBits | None = None,
) -> Teacher:
    """Loads the autoregressive teacher like `load_model`; error messages name the teacher's checkpoint."""
    try:
        checkpoint = open_checkpoint(path)
        modes = checkpoint.record.modes
        if modes and all(mode.noise for mode in modes) and not allow_mismatch:
            raise UserError(f"{checkpoint} is a diffusion model. Set TEACHER_CHECKPOINT_PATH to an autoregressive one.")
        Agreement.of(checkpoint, setting, allow_mismatch).check(config, [Autoregressive()])
        return Teacher(*load_model(checkpoint, config, vocabulary, mesh, few_bits=few_bits))
    except UserError as error:
        raise UserError(f"The teacher's checkpoint: {error}") from error


def abstract_start(mesh: Mesh, definition: lora_training.LoraDefinition) -> Teacher:
    """Returns the model from which a LoRA run starts as a teacher that shares the run's base.

    Its own parameters, as shapes, are those that the run trains in full.
    """
    plain = ModelDefinition(definition.config, definition.vocabulary)
    own = definition.only_whole(abstract_params(mesh, plain))
    return Teacher(plain, own, lora_training.start_of)


def load_start(
    path: AnyCheckpoint, definition: ModelDefinition, mesh: Mesh, few_bits: FewBits | None = None
) -> Teacher:
    """Loads the model from which a run starts, not its moving average, as a teacher: see `abstract_start` for LoRA.

    Args:
      path: the run's initial checkpoint.
      definition: the run's model.
      mesh: the mesh for the parameters.
      few_bits: quantize the layers' matrices, where they are not the run's base.
    """
    if not isinstance(definition, lora_training.LoraDefinition):
        given = (path, definition.config, definition.vocabulary, mesh)
        return Teacher(*load_model(*given, use_ema=False, few_bits=few_bits))
    checkpoint = open_checkpoint(path)
    definition.vocabulary.check_same(checkpoint.metadata["vocabulary"], str(checkpoint))
    start = abstract_start(mesh, definition)
    if not start.params:
        return start
    own = "|".join(map(re.escape, named_leaves(start.params)))
    others = (rf"params/(?!({own})$).*", None)
    return start._replace(params=restoring.restore_params(checkpoint, start.params, [others]))


def load_model(
    path: AnyCheckpoint,
    config: ModelConfig,
    vocabulary: TokenIds,
    mesh: Mesh,
    *,
    restore_rules: Sequence[Rule] = (),
    use_ema: bool = True,
    few_bits: FewBits | None = None,
) -> tuple[ModelDefinition, Params]:
    """Loads a checkpoint's model for inference; LoRA is merged, except updates that only drafts read.

    Args:
      path: a checkpoint folder, a folder of them or a MODEL_DIR; or an open checkpoint.
      config: the model's dimensions.
      vocabulary: the task's vocabulary; must be the one that the model was trained with.
      mesh: the mesh for the parameters.
      restore_rules: as in training; names begin with `params/`.
      use_ema: take the moving average of the parameters if the checkpoint has one.
      few_bits: quantize the merged matrices of the layers.

    Raises:
      UserError: no checkpoint, another vocabulary, or parameters that do not fit.
    """
    path = open_checkpoint(path)
    vocabulary.check_same(path.metadata["vocabulary"], str(path))
    lora = None if few_bits else lora_training.of_drafts(path.record.lora)
    if few_bits:
        definition: ModelDefinition = FrozenDefinition(config, vocabulary, few_bits)
    else:
        definition = lora_training.define(config, vocabulary, lora)
    check_start(path, vocabulary, {"params": definition.abstract()}, restore_rules, merge=lora is None)
    abstract = abstract_params(mesh, definition)
    return definition, restoring.restore_params(path, abstract, restore_rules, use_ema, merge=lora is None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """The settings that the verbs share which use a checkpoint's model.

    Attributes:
      model: dimensions of the checkpoint's model.
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR.
      restore_rules: assignment rules, as in training.
      use_ema: use the moving average of the parameters if the checkpoint has one.
      allow_mismatch: use the model other than as it was trained, according to the checkpoint's record: as another
        function, or with another decoder or objective.
      mesh: the arrangement of devices.
    """

    ALLOW_MISMATCH: ClassVar[str]  # full name of the last but one

    model: ModelConfig
    checkpoint_path: str | None
    restore_rules: Sequence[Rule] = ()
    use_ema: bool = True
    allow_mismatch: bool = False
    mesh: MeshConfig = MeshConfig()

    def check_use(self, checkpoint: OpenCheckpoint, *used: Decoder | Objective | None) -> None:
        """Raises a UserError if the checkpoint's model was not trained for these decoders and objectives."""
        Agreement.of(checkpoint, self.ALLOW_MISMATCH, self.allow_mismatch).check(self.model, used)

    def load(self, checkpoint: OpenCheckpoint, vocabulary: TokenIds, mesh: Mesh) -> tuple[ModelDefinition, Params]:
        """Loads the model; see `load_model`."""
        where = (vocabulary, mesh)
        return load_model(checkpoint, self.model, *where, restore_rules=self.restore_rules, use_ema=self.use_ema)


def abstract_params(mesh: Mesh, definition: ModelDefinition) -> Params:
    """Returns shapes, dtypes and shardings of parameters for inference, see `ModelDefinition.as_read`."""
    shapes = jax.eval_shape(definition.as_read, definition.abstract())
    shardings = partitioning.param_shardings(mesh, shapes, definition.axes())
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def abstract_batch(mesh: Mesh, dataset: Dataset, batch_size: int, rollout: Rollout | None = None) -> Batch:
    """Returns shapes, dtypes and shardings of a training batch, from lengths only; with a rollout, of the longest."""
    sharding = partitioning.batch_sharding(mesh)
    lengths = dict(dataset.task_feature_lengths)

    decoder = None if rollout is None else rollout.decoder
    steps = decoder.num_steps if isinstance(decoder, SundaeDecoder) else None

    def rows(dtype: type, *shape: int) -> Any:  # it stands where an array will
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    apart = dataset.architecture == "encoder_decoder"
    length = lengths["targets"] if apart else dataset.row_length
    if rollout is not None:  # of a decoder-only model
        length += rollout.max_length - lengths["targets"]
    encoder = ("encoder_tokens", "encoder_segment_ids", "encoder_positions") if apart else ()
    return Batch(
        tokens=rows(np.int32, length),
        target_mask=rows(np.bool_, length),
        segment_ids=rows(np.int32, length),
        positions=rows(np.int32, length),
        example_ids=rows(np.int32),
        written_at=rows(np.int32, length) if rollout is not None else None,
        written_log_probability=rows(np.float32, length) if rollout is not None else None,
        canvases=rows(np.int32, steps, length) if steps is not None else None,
        canvas_log_probability=rows(np.float32, steps, length) if steps is not None else None,
        advantage=rows(np.float32) if rollout is not None and rollout.rewards is not None else None,
        **{name: rows(np.int32, lengths["inputs"]) for name in encoder},
    )
