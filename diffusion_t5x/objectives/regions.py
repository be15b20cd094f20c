"""Regions, which a masked model writes in steps of their own: blocks of targets, or all targets of a text."""

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.masks import BIDIRECTIONAL, AttentionKind
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Output
from diffusion_t5x.models.reading import Reading, model_reads
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.block import InBlocks
from diffusion_t5x.objectives.blocks import block_starts
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.objective import Likelihood, Objective
from diffusion_t5x.shapes import IntB, IntBL, KeyScalar


class InRegions(Objective):
    """An objective that reads states of regions, with MASK in place of some of their targets.

    Attributes:
      slots_read: slots that a pass over a state reads, per slot of the batch.
    """

    slots_read: ClassVar[int]

    @abc.abstractmethod
    def noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        """Returns the tokens in a state that `loss` reads."""

    @abc.abstractmethod
    def starts(self, batch: Batch) -> IntBL:
        """Returns the row index of the first target of the region that a target is in; any index for other slots."""

    @abc.abstractmethod
    def most_targets(self, batch: Batch) -> IntB | int:
        """Returns a number of targets that no region exceeds, of each row or of all."""

    @abc.abstractmethod
    def read(self, model: Transformer, batch: Batch, noisy: IntBL) -> tuple[Batch, Output]:
        """Runs a pass whose hidden states predict the noisy tokens.

        Args:
          model: reads them.
          batch: the clean tokens.
          noisy: the tokens, with MASK in place of some targets.

        Returns:
          The batch without the tokens that had no room, and the output.
        """


@dataclasses.dataclass(frozen=True)
class BlockRegions(InBlocks, InRegions):
    """Regions are the blocks of block diffusion, read in one pass over `[clean text | state]`."""

    slots_read: ClassVar[int] = 2

    def starts(self, batch: Batch) -> IntBL:
        return jnp.maximum(block_starts(batch, self.block_size, self.blocks_from), 0)

    def most_targets(self, batch: Batch) -> int:
        return self.block_size

    def read(self, model: Transformer, batch: Batch, noisy: IntBL) -> tuple[Batch, Output]:
        found = self.output(model, batch, noisy)
        return found.batch, found.output


class CanvasRegions(InRegions):
    """The one region of a text is its whole canvas, read in one bidirectional pass over the state."""

    slots_read: ClassVar[int] = 1

    @property
    def attention(self) -> AttentionKind:
        return BIDIRECTIONAL

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, "mask"),)

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        return model_reads(self.noisy(model.vocabulary, batch, key), batch, model)

    def starts(self, batch: Batch) -> IntBL:
        return jnp.maximum(block_starts(batch, batch.tokens.shape[1]), 0)  # one block has room for the whole row

    def most_targets(self, batch: Batch) -> IntB:
        return jnp.maximum(jnp.sum(batch.target_mask, axis=-1), 1)

    def read(self, model: Transformer, batch: Batch, noisy: IntBL) -> tuple[Batch, Output]:
        reading = Reading.of(batch, model.vocabulary, model.config.shifted, packed=True)
        return reading.fits(batch), reading.output(model, noisy, self.attention, model.encode(batch))

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """A lower bound, see `Masked`."""
        return Masked().log_likelihood(model, batch, key, num_draws)
