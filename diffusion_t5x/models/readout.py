"""Cross-entropy and accuracy of given tokens, from hidden states."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.sampling import forbid, is_likeliest
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import AnyIntBL, Array, BoolBL, FloatBL, FloatBLD, FloatBLV

LossSoftmax = Literal["allowed", "all"]


def cross_entropy(
    logits: Float[jax.Array, "*shape vocab"],
    labels: Int[Array, "*shape"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[jax.Array, "*shape"], Float[jax.Array, "*shape"]]:
    """Returns the cross-entropy of labels under logits, in nats.

    Label smoothing gives `1 - label_smoothing` to the label and shares the rest among the other ids; the entropy of
    that target is subtracted, so that the minimum stays 0. `z_loss * log(Z)^2` pulls the normaliser towards 1 (both as
    in T5X).

    Returns:
      The loss with smoothing and z-loss, and the plain negative log-likelihood.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = nll
    if label_smoothing:
        others = logits.shape[-1] - 1
        rest = label_smoothing / others
        entropy = -((1 - label_smoothing) * jnp.log(1 - label_smoothing) + label_smoothing * jnp.log(rest))
        nll_of_others = (others + 1) * log_z - logits.sum(axis=-1) - nll
        loss = (1 - label_smoothing) * nll + rest * nll_of_others - entropy
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    return loss, nll


def score(
    model: Transformer, hidden: FloatBLD, labels: AnyIntBL, softmax: LossSoftmax = "allowed"
) -> tuple[FloatBL, BoolBL]:
    """Returns cross-entropy of labels in nats, and True where no other id is more likely.

    Args:
      model: reads out.
      hidden: the labels' hidden states.
      labels: ids.
      softmax: what the cross-entropy is over. "allowed": what may be written. "all": all rows of the embedding, MASK
        too. Accuracy is always over what may be written.
    """

    def read_out(logits, labels):
        return score_logits(logits, labels, model.vocabulary, softmax)

    return model.map_logits(read_out, hidden, labels)


def score_logits(
    logits: FloatBLV, labels: AnyIntBL, vocabulary: TokenIds, softmax: LossSoftmax = "allowed"
) -> tuple[FloatBL, BoolBL]:
    """`score` of logits."""
    allowed = forbid(logits, vocabulary)
    nll, _ = cross_entropy(allowed if softmax == "allowed" else logits, labels)
    return nll, is_likeliest(allowed, labels)
