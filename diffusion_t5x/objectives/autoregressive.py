"""The autoregressive objective: predicts each target from the tokens before it."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.modes import LeftToRight
from diffusion_t5x.models.output import Output
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.models.readout import cross_entropy, score
from diffusion_t5x.models.sampling import is_likeliest
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Normalize, Objective, Pass, normalized
from diffusion_t5x.shapes import IntBL, IntScalar, KeyB, KeyScalar


@dataclasses.dataclass(frozen=True)
class Autoregressive(LeftToRight, Objective):
    """Teacher forcing: cross-entropy of `tokens[i]` given the start token and `tokens[:i]`.

    Attributes:
      prefix: bidirectional attention over inputs (T5's prefix LM, arXiv 1910.10683, section 3.2.1); by default
        attention is causal everywhere.
      label_smoothing, z_loss: as in T5X.
      normalize: denominator of the summed loss.
    """

    autoregressive: ClassVar[bool] = True

    prefix: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    normalize: Normalize = "target_tokens"

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
            raise UserError(f"label_smoothing must lie in [0, 1) and z_loss must not be negative; got {self}.")

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(),)

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar | None) -> IntBL:
        return shift_right(batch.tokens, batch.positions, model.vocabulary.start_id)

    def output(self, model: Transformer, batch: Batch, dropout_keys: KeyB | None = None) -> Output:
        """Runs a pass; the i-th of its hidden states predicts the i-th token."""
        tokens = shift_right(batch.tokens, batch.positions, model.vocabulary.start_id)
        encoded = model.encode(batch, dropout_keys)
        return model(tokens, shifted_slots(batch, model.vocabulary), self.attention, encoded, dropout_keys)

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar | None,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        """Returns the loss. The key is used only for dropout; the objective itself is deterministic."""
        dropout_keys = None
        if train and key is not None:
            dropout_keys = row_keys(stream(key, "dropout"), batch.example_ids)
        output = self.output(model, batch, dropout_keys)

        def read_out(logits, labels):
            loss, nll = cross_entropy(logits, labels, label_smoothing=self.label_smoothing, z_loss=self.z_loss)
            return loss, nll, is_likeliest(logits, labels)

        loss, nll, correct = model.map_logits(read_out, output.hidden, batch.tokens)
        return LossSums(
            loss=normalized(batch, loss, self.normalize),
            metrics={
                "nll": normalized(batch, nll, "target_tokens"),
                "accuracy": normalized(batch, correct, "target_tokens"),
            },
            auxiliary=output.auxiliary,
        )

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar | None, num_draws: int) -> Likelihood:
        """Exact, by the chain rule, over the text's tokens up to the one that ends it: all that a decoder writes.

        As in decoding, ids that no model may write (MASK, rows without an id) have no probability; the loss gives them
        some. So an imported model, which never learned to avoid them, has a slightly lower `nll` here.
        """
        nll, _ = score(model, self.output(model, batch).hidden, batch.tokens)
        text = text_of(batch, model.vocabulary)
        return Likelihood(
            log_likelihood=-jnp.sum(jnp.where(text, nll, 0), axis=-1),
            standard_error=jnp.zeros(len(text)),
            num_tokens=jnp.sum(text, axis=-1, dtype=jnp.int32),
        )
