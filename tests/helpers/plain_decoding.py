"""Every decoder once more in plain steps: one text alone, a whole pass of the model a step, no cache and no padding.

Beside the text it tells how narrowly each step was decided, so that a text that differs can be told from a tie.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.decoder import end_at_eos
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.reading import shift_right, shifted_slots, start_first
from diffusion_t5x.models.streams import stream

TOLERANCE = 1e-5  # of logits, as a share of the largest


def start_ahead(batch, canvas, vocabulary):
    """Slots and tokens `[B, L + 1]` of rows of one example each, which the start token is ahead of as an input."""
    slots = Slots.of(batch)
    slots = Slots(
        segment_ids=jnp.concatenate([slots.segment_ids[:, :1], slots.segment_ids], axis=1),
        positions=jnp.pad(slots.positions + 1, ((0, 0), (1, 0))),
        is_input=jnp.concatenate([slots.segment_ids[:, :1] > 0, slots.is_input], axis=1),
    )
    return slots, jnp.pad(canvas, ((0, 0), (1, 0)), constant_values=vocabulary.start_id)


@functools.cache
def reader(definition, decoder_class, kind):
    """The jitted `(params, batch, canvas) -> logits [B, L, V]` of whole passes, as this decoder's model reads."""

    @jax.jit
    def read(params, batch, canvas):
        model = definition.bind(params)
        if definition.config.shifted and not decoder_class.autoregressive:
            slots, tokens = start_ahead(batch, canvas, definition.vocabulary)
            return model.logits(model(tokens, slots, kind, model.encode(batch)).hidden)[:, :-1]
        slots, tokens = Slots.of(batch), canvas
        if decoder_class is AutoregressiveDecoder:
            slots, tokens = (
                shifted_slots(batch, definition.vocabulary),
                shift_right(canvas, batch.positions, definition.vocabulary.start_id),
            )
        elif decoder_class is not SundaeDecoder:
            tokens = start_first(canvas, batch.positions, definition.vocabulary)
        return model.logits(model(tokens, slots, kind, model.encode(batch)).hidden)

    return read


def kind_of(decoder):
    return getattr(decoder, "attention", BIDIRECTIONAL)


@functools.partial(jax.jit, static_argnums=(1, 2))
def gumbel(key, numbers, size):
    """`[numbers, size]`: what is drawn at each number."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(numbers))
    return jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(keys)


class PlainDecoding:
    """A decoder's text for the one row of a batch.

    Attributes:
      tokens: int `[L]`, ended where it ends.
      read: maps a canvas `[1, L]` to the logits `[1, L, V]` of a whole pass.
      narrowest: the least gap between what was chosen and what came next, of all steps: of logits with their noise, as
        a share of the largest logit; of probabilities, where positions are chosen by them.
    """

    def __init__(self, definition, params, decoder, batch, seed):
        self.vocabulary, self.decoder, self.batch = definition.vocabulary, decoder, batch
        self.narrowest = np.inf
        self.read = functools.partial(reader(definition, type(decoder), kind_of(decoder)), params, batch)
        self._targets = np.flatnonzero(batch.target_mask[0])
        key = jax.random.fold_in(jax.random.key(seed), batch.example_ids[0])
        if isinstance(decoder, AutoregressiveDecoder):
            canvas = self._autoregressive(key)
        elif isinstance(decoder, BlockDecoder):
            canvas = self._blocks(key)
        elif isinstance(decoder, SundaeDecoder):
            canvas = self._best_of_samples(key)
        else:
            canvas = np.array(decoder.blank(batch, self.vocabulary, key[None]))
            self._write(decoder, canvas, self._targets, key)
        self.tokens = np.asarray(end_at_eos(canvas, batch, self.vocabulary))[0]

    def _autoregressive(self, key):
        canvas = np.where(self.batch.target_mask, self.vocabulary.pad_id, self.batch.tokens)
        for step, place in enumerate(self._targets):
            ((token,), _) = self._choose(canvas, [place], self.decoder.temperature, key, [step])
            canvas[0, place] = token
            if token in (self.vocabulary.eos_id, self.vocabulary.pad_id):
                break
        return canvas

    def _best_of_samples(self, key):
        """The canvas that the model wants to change the least, by the cross-entropy of what its last step reads."""
        canvases, scores = [], []
        for sample in range(self.decoder.num_samples):
            sample_key = key
            if sample > 0:
                sample_key = jax.random.fold_in(stream(key, "samples"), sample)
            canvas = np.array(self.decoder.blank(self.batch, self.vocabulary, sample_key[None]))
            scores.append(self._write(self.decoder, canvas, self._targets, sample_key))
            canvases.append(canvas)
        if len(scores) > 1:
            best, second, *_ = sorted(scores)
            self._decided(second - best)
        return canvases[int(np.argmin(scores))]

    def _blocks(self, key):
        inner, size = self.decoder.inner, self.decoder.block_size
        canvas = np.array(inner.blank(self.batch, self.vocabulary, key[None]))
        for start in range(0, len(self._targets), size):
            block = self._targets[start : start + size]
            self._write(inner, canvas, block, key)
            if np.isin(canvas[0, block], (self.vocabulary.eos_id, self.vocabulary.pad_id)).any():
                break
        return canvas

    def _write(self, inner, canvas, places, key):
        """All steps of SUNDAE's or the masked decoder over these places; returns SUNDAE's score."""
        if isinstance(inner, SundaeDecoder):
            for step in range(inner.num_steps):
                step_key = stream(jax.random.fold_in(stream(key, "steps"), step), "tokens")
                numbers = self.batch.positions[0, places]
                read = canvas[0, places]
                canvas[0, places], likely = self._choose(canvas, places, inner.temperature, step_key, numbers)
            return -np.log(likely[np.arange(len(places)), read]).mean()
        step = 0
        while len(left := places[canvas[0, places] == self.vocabulary.mask_id]):
            token_key = stream(jax.random.fold_in(stream(key, "steps"), step), "tokens")
            numbers = self.batch.positions[0, left]
            tokens, likely = self._choose(canvas, left, inner.temperature, token_key, numbers)
            sure = likely[np.arange(len(left)), tokens]
            count = 1 if inner.num_steps is None else -(-len(left) // (inner.num_steps - step))
            order = np.argsort(-sure, kind="stable")
            chosen = np.isin(np.arange(len(left)), order[:count])
            if inner.threshold is not None:
                chosen |= sure > inner.threshold
                self._decided(np.abs(sure - inner.threshold).min())
            if chosen.any() and not chosen.all():
                self._decided(sure[chosen].min() - sure[~chosen].max())
            canvas[0, left[chosen]] = tokens[chosen]
            step += 1
        return None

    def _choose(self, canvas, places, temperature, key, numbers):
        """A token for each place, and the probabilities of all."""
        logits = np.asarray(self.read(canvas))[0, places]
        largest = np.abs(logits).max()
        logits[:, self.vocabulary.mask_id] = -np.inf
        logits[:, self.vocabulary.size :] = -np.inf
        noisy = logits
        if temperature:
            noise = np.asarray(gumbel(key, self.batch.tokens.shape[1], logits.shape[1]))
            noisy = logits + temperature * noise[numbers]
        second, first = np.sort(noisy, axis=-1)[:, -2:].T
        self._decided((first - second).min() / largest)
        tokens = noisy.argmax(axis=-1)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return tokens, weights / weights.sum(axis=-1, keepdims=True)

    def _decided(self, gap):
        self.narrowest = min(self.narrowest, gap)


def is_tie(found, plain):
    """True where a text `[L]` differs from the plain one by a tie, False where it is the same.

    Raises:
      AssertionError: it differs without a tie.
    """
    if np.array_equal(found, plain.tokens):
        return False
    assert plain.narrowest < TOLERANCE, f"{found} is not {plain.tokens}, though no gap is below {plain.narrowest}"
    return True
