"""Starts a training: from its own latest checkpoint, from another run's, or from scratch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import optax

from diffusion_t5x.checkpointing import checkpoints, restoring, stored
from diffusion_t5x.checkpointing.assignment import Rule
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.checkpointing.start import check_start
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.training.agreement import Agreement
from diffusion_t5x.training.lora import Lora, LoraDefinition
from diffusion_t5x.training.state import TrainState, fresh_state, init_state


@dataclasses.dataclass(frozen=True)
class Begun:
    """The starting point of a run.

    Attributes:
      state: the state before the run's first step.
      data_state: the position in the data; None at the beginning.
      evaluation_due: an earlier run did not finish the evaluation of this state.
      losses: the losses that the judge of bad steps remembers.
    """

    state: TrainState
    data_state: Mapping[str, np.ndarray] | None = None
    evaluation_due: bool = False
    losses: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Start:
    """The source of a training's first state.

    Attributes:
      checkpoint: the checkpoint to continue or start from; None starts from scratch.
      resumes: the checkpoint is the run's own.
      rules: assignment rules for another run's checkpoint.
    """

    checkpoint: OpenCheckpoint | None = None
    resumes: bool = False
    rules: Sequence[Rule] = ()

    @classmethod
    def find(cls, folder: str, initial_path: str | None, rules: Sequence[Rule], allow_older: bool) -> Self:
        """Finds the latest checkpoint in the run's folder; if there is none, the initial one, if given.

        Args:
          folder: folder of the run's checkpoints.
          initial_path: a user's path, or None.
          rules: assignment rules for the initial checkpoint.
          allow_older: if the latest is broken, take the newest intact one.

        Raises:
          UserError: there is no checkpoint at the initial path.
        """
        if own := (stored.latest_whole if allow_older else checkpoints.latest)(folder):
            return cls(checkpoints.open_checkpoint(own), resumes=True)
        if initial_path:
            return cls(OpenCheckpoint(checkpoints.find_checkpoint(initial_path)), rules=rules)
        return cls()

    def __str__(self) -> str:
        if self.checkpoint is None:
            return "from scratch"
        return f"{'resuming' if self.resumes else 'initialised'} from {self.checkpoint.named}"

    def check(
        self,
        definition: ModelDefinition,
        abstract: TrainState,
        objective: Objective,
        lora: Lora | None,
        setting: str,
        allow_mismatch: bool,
    ) -> str:
        """Describes what happens to each array; "" from scratch. Reads only names and shapes.

        Raises:
          UserError: the checkpoint has another model or training, see `Agreement`; or its arrays do not fit.
        """
        if self.checkpoint is None:
            return ""
        agreement = Agreement.of(self.checkpoint, setting, allow_mismatch)
        if self.resumes:
            agreement.check_resumed(definition.config, objective, lora)
        else:
            agreement.check_initial(definition.config, objective)
        return check_start(
            self.checkpoint,
            definition.vocabulary,
            abstract,
            self._rules(definition),
            merge=not self.resumes,
            resumes=self.resumes,
        )

    def begin(
        self, definition: ModelDefinition, optimizer: optax.GradientTransformation, abstract: TrainState, seed: int
    ) -> Begun:
        """Reads or creates the state, with each array placed on the mesh."""
        if self.checkpoint is None:
            return Begun(init_state(abstract, definition, optimizer, seed))
        if self.resumes:
            state, data_state, metadata = restoring.restore(self.checkpoint, abstract)
            return Begun(state, data_state, metadata.get("evaluation_due", False), metadata.get("losses", ()))

        def fresh() -> TrainState:
            return fresh_state(definition, optimizer, abstract.ema is not None, jax.random.key(seed))

        return Begun(restoring.restore_initial(self.checkpoint, abstract, self._rules(definition), init=fresh))

    def _rules(self, definition: ModelDefinition) -> Sequence[Rule]:
        if isinstance(definition, LoraDefinition) and not self.resumes:
            return definition.restore_rules(self.rules)
        return self.rules
