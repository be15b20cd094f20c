"""A training run before anything of it is built: its settings, and a trial of its step for memory and time."""

import dataclasses
import time
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.dataset import Dataset
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.evaluation.loading import abstract_batch, abstract_params, abstract_start
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.frozen import FrozenDefinition
from diffusion_t5x.models.quantized import FewBits
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.distillation import Teacher
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance.roofline import Memory
from diffusion_t5x.training import lora as lora_training
from diffusion_t5x.training.host_batches import HostBatches
from diffusion_t5x.training.rollout import OnPolicyBatches, Rollout
from diffusion_t5x.training.state import TrainState, abstract_state, init_state, split
from diffusion_t5x.training.step import TrainStep, make_train_step


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """The settings of `train.train` that a step depends on; see there."""

    mesh: MeshConfig
    model: ModelConfig
    objective: Objective
    dataset: Dataset
    optimizer: optax.GradientTransformation
    lora: lora_training.Lora | None = None
    microbatches: int = 1
    normalizing_factor: float | None = None
    ema_decay: float | None = None
    teacher_model: ModelConfig | None = None
    frozen_dtype: FewBits | None = None
    rollout: Rollout | None = None

    def definition(self) -> ModelDefinition:
        """The model to train."""
        return lora_training.define(self.model, self.dataset.token_ids(), self.lora)

    def num_trained(self) -> int:
        """Number of parameters that are trained."""
        definition = self.definition()
        return sum(leaf.size for leaf in jax.tree.leaves(split(definition, definition.abstract())[0]))

    def state(self, mesh: Mesh) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(mesh, self.definition(), self.optimizer, self.ema_decay is not None)

    def teacher(self, mesh: Mesh) -> Teacher | None:
        """The shape of the teacher, where the objective needs one."""
        if not self.objective.needs_teacher:
            return None
        definition = self.definition()
        if self.objective.taught_by_start and isinstance(definition, lora_training.LoraDefinition):
            return abstract_start(mesh, definition)
        settings = (self.teacher_model or self.model, self.dataset.token_ids())
        taught_by = FrozenDefinition(*settings, self.frozen_dtype) if self.frozen_dtype else ModelDefinition(*settings)
        return Teacher(taught_by, abstract_params(mesh, taught_by))

    def step(self, mesh: Mesh, teacher: Teacher | None) -> TrainStep:
        """The training step."""
        return make_train_step(
            mesh,
            self.state(mesh),
            self.definition(),
            self.objective,
            self.optimizer,
            seed=0,
            microbatches=self.microbatches,
            normalizing_factor=self.normalizing_factor,
            ema_decay=self.ema_decay,
            teacher=teacher,
        )

    def lower(self, mesh: Mesh, batch_size: int | None = None) -> jax.stages.Lowered:
        """Returns the step for shapes, to be compiled.

        Args:
          mesh: of the devices.
          batch_size: rows over all devices; None takes those of the data set.
        """
        batch = abstract_batch(mesh, self.dataset, batch_size or self.dataset.batch_size, self.rollout)
        return self.step(mesh, self.teacher(mesh)).lower(self.state(mesh), batch)


class StepReader(Protocol):
    """Reader of the settings of a step; `train.train` takes one as its `dry_run` and trains nothing."""

    def train(self, run: TrainingRun) -> None: ...


class Trial:
    """A run's step, compiled for its devices.

    Attributes:
      peak_bytes: per device, as XLA plans it: state, batch and temporaries.
    """

    def __init__(self, run: TrainingRun):
        self._run, self._mesh = run, run.mesh.make()
        with jax.set_mesh(self._mesh):
            self._compiled = run.lower(self._mesh).compile()
        self.peak_bytes = Memory.of(self._compiled).peak

    def seconds_per_step(self, num_steps: int = 2) -> float:
        """Seconds per step on real data with random parameters, the fastest of `num_steps` after a first one.

        The time in which the model writes the texts of an on-policy step is included.
        """
        run, mesh = self._run, self._mesh
        assert isinstance(run.dataset, SeqioDataset)
        state = init_state(run.state(mesh), run.definition(), run.optimizer, 0)
        teacher = run.teacher(mesh)
        zeros = teacher and jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), teacher.params)
        batches = HostBatches(run.dataset.train_iterator, run.dataset.batch_size, partitioning.share_of_rows(mesh))
        batch, writing = (next(batches), 0.0) if run.rollout is None else self._written(run.rollout, batches, state)
        seconds = []
        with jax.set_mesh(mesh):
            placed = partitioning.put_batch(mesh, batch)
            for _ in range(1 + num_steps):
                start = time.perf_counter()
                state, metrics = self._compiled(zeros, state, placed, np.float32(np.inf), np.uint32(0))
                jax.block_until_ready(metrics)
                seconds.append(time.perf_counter() - start)
        return min(seconds[1:]) + writing

    def _written(self, rollout: Rollout, prompts: HostBatches, state: TrainState) -> tuple[Batch, float]:
        """A batch of the longest texts that the model writes, and the seconds that writing one takes."""
        dataset, lengths = self._run.dataset, dataclasses.replace(rollout.lengths, num_rollouts=0)
        longest = dataclasses.replace(rollout, lengths=lengths, passes=1, rewards=None, ahead=False)
        num_inputs = dataset.task_feature_lengths["inputs"]
        batches = OnPolicyBatches(
            self._mesh, self._run.definition(), longest, prompts, num_inputs, dataset.batch_size, seed=0
        )
        for _ in range(rollout.num_batches):  # the first of them compiles and writes them all
            batch = batches.next_batch(state)
        start = time.perf_counter()
        batch = batches.next_batch(state)
        seconds = (time.perf_counter() - start) / (rollout.num_batches * rollout.passes)
        if rollout.rewards is not None:  # how long a reward takes is not the model's time
            batch = batch.replace(advantage=np.zeros(len(batch.tokens), np.float32))
        return batch, seconds
