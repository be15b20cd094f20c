"""The best text of a language on a canvas, or a random one: dynamic programming over an automaton.

At temperature 0 this is DINGO (arXiv 2505.23061): of all texts of the language that agree with the tokens written
already, the one of greatest product of the probabilities that the model gives to its tokens at their positions. Above
0, a text is drawn with a probability in proportion to that product, of probabilities at the temperature: exactly, by
sums over the rest of the text from the right and draws from the left.

Targets that follow each other without a gap are one text, at most as long as they are.
"""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.models.sampling import Sampling, forbid, gumbel
from diffusion_t5x.models.streams import stream
from diffusion_t5x.shapes import BoolBL, FloatBL, FloatBLV, IntB, IntBL, KeyB


class Choices(flax.struct.PyTreeNode):
    """The tokens to choose from at each position: one of each class, `[batch, length, classes]`.

    Attributes:
      weight: log-weight of the class: the largest log-probability of its tokens, or at a temperature above 0 the log of
        their sum.
      tokens: the class's token: its most likely one, or a draw.
      log_probability: of that token, at temperature 1 over all ids that may be written.
    """

    weight: Float[jax.Array, "batch length classes"]
    tokens: Int[jax.Array, "batch length classes"]
    log_probability: Float[jax.Array, "batch length classes"]

    @classmethod
    def of(
        cls,
        language: Language,
        logits: FloatBLV,
        vocabulary: TokenIds,
        sampling: Sampling,
        keys: KeyB,
        positions: IntBL,
    ) -> Self:
        """Reads the choices from logits; draws at a position depend only on its number and the row's key."""
        allowed = jax.nn.log_softmax(forbid(logits, vocabulary))
        if sampling.temperature == 0:
            weight, tokens = language.tokens.largest(allowed)
            return cls(weight, tokens, weight)
        scaled = jax.nn.log_softmax(allowed / sampling.temperature)
        noise = gumbel(stream(keys, "tokens"), positions, logits.shape[-1])
        _, tokens = language.tokens.largest(scaled + noise)
        weight = language.tokens.reduce(scaled, jax.nn.logsumexp)
        return cls(weight, tokens, jnp.take_along_axis(allowed, tokens, axis=-1))


class Span(flax.struct.PyTreeNode):
    """The text around a block of its targets.

    Attributes:
      state: the automaton's state before the block.
      left: number of the text's targets after it.
    """

    state: IntB
    left: IntB

    @classmethod
    def whole(cls, language: Language, num_rows: int) -> Self:
        """Rows that hold their texts whole."""
        return cls(jnp.full(num_rows, language.start, jnp.int32), jnp.zeros(num_rows, jnp.int32))

    def advance(self, language: Language, tokens: IntBL, target_mask: BoolBL) -> Self:
        """Returns the text around what follows these targets, whose tokens continue a text of the language."""
        labels_of, targets_of = jnp.asarray(language.labels), jnp.asarray(language.targets)

        def step(state, at):
            label, is_target = at
            column = jnp.argmax(labels_of[state] == label[:, None], axis=-1)
            return jnp.where(is_target, targets_of[state, column], state), None

        labels = jnp.asarray(language.class_of)[tokens]
        return self.replace(state=jax.lax.scan(step, self.state, (labels.T, target_mask.T))[0])

    def only_fitting(
        self, language: Language, logits: Float[jax.Array, "batch vocab"], left: IntB
    ) -> Float[jax.Array, "batch vocab"]:
        """Returns logits of the next token, -inf for those after which no text ends within `left` more tokens."""
        label, target = jnp.asarray(language.labels)[self.state], jnp.asarray(language.targets)[self.state]
        fits = (label >= 0) & (jnp.asarray(language.shortest)[target] <= left[:, None])
        # One class more for all ids without one, which never fit.
        num_classes = len(language.tokens.levels[-1])
        rows = jnp.arange(len(label))[:, None]
        allowed = jnp.zeros((len(label), num_classes + 1), bool)
        allowed = allowed.at[rows, jnp.where(fits, label, num_classes)].max(fits)
        class_of = np.pad(language.class_of, (0, logits.shape[-1] - len(language.class_of)), constant_values=-1)
        return jnp.where(allowed[:, class_of], logits, -jnp.inf)


def choose_text(
    language: Language,
    choices: Choices,
    tokens: IntBL,
    kept: BoolBL,
    target_mask: BoolBL,
    span: Span | None,
    draw: tuple[KeyB, IntBL] | None,
) -> tuple[IntBL, FloatBL]:
    """Returns the tokens of a text of the language for all targets, and their log-probabilities (see `Choices`).

    Args:
      language: allows at least one text, see `Language.check_fits`.
      choices: the tokens of each class.
      tokens: the canvas.
      kept: targets whose tokens stay; some text of the language has them there.
      target_mask: positions of the texts.
      span: what is around the rows; None: nothing.
      draw: keys of the rows, and positions, for a random text; None takes the best one.
    """
    span = Span.whole(language, len(tokens)) if span is None else span
    num_classes = choices.weight.shape[-1]
    labels = jnp.asarray(language.class_of)[tokens]
    of_kept = jnp.where(labels[..., None] == jnp.arange(num_classes), 0.0, -jnp.inf)
    weight = jnp.moveaxis(jnp.where(kept[..., None], of_kept, choices.weight), 1, 0)
    goes_on = jnp.pad(target_mask[:, 1:], ((0, 0), (0, 1))).T
    begins = (target_mask & ~jnp.pad(target_mask[:, :-1], ((0, 0), (1, 0)))).T
    how = jnp.max if draw is None else jax.nn.logsumexp
    at_end = jnp.where(language.shortest <= span.left[:, None], 0.0, -jnp.inf)

    def back(later, at):
        weight, goes_on = at
        later = jnp.where(goes_on[:, None], later, at_end)
        each = weight[:, language.label] + later[:, language.target]
        return language.transitions.reduce(each, how), later

    _, later = jax.lax.scan(back, at_end, (weight, goes_on), reverse=True)
    labels_of, targets_of = jnp.asarray(language.labels), jnp.asarray(language.targets)
    noise = jnp.zeros((*tokens.shape, 1))
    if draw is not None:
        noise = gumbel(stream(draw[0], "classes"), draw[1], language.labels.shape[1])

    def forth(state, at):
        weight, later, begins, is_target, noise = at
        state = jnp.where(begins, span.state, state)
        label, target = labels_of[state], targets_of[state]
        each = jnp.take_along_axis(weight, label, axis=-1) + jnp.take_along_axis(later, target, axis=-1) + noise
        best = jnp.argmax(jnp.where(label >= 0, each, -jnp.inf), axis=-1)[:, None]
        taken, after = (jnp.take_along_axis(x, best, axis=-1)[:, 0] for x in (label, target))
        return jnp.where(is_target, after, state), taken

    steps = (weight, later, begins, target_mask.T, jnp.moveaxis(noise, 1, 0))
    _, labels = jax.lax.scan(forth, span.state, steps)
    chosen = labels.T[..., None]
    found = (jnp.take_along_axis(x, chosen, axis=-1)[..., 0] for x in (choices.tokens, choices.log_probability))
    written, log_probability = found
    return jnp.where(kept, tokens, written), log_probability
