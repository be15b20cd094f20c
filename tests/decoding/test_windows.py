"""Masked decoding in windows, ends that come last or never, guidance: what tests of published models leave open."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.ancestral import AncestralDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.commit import propose
from diffusion_t5x.decoding.counts import unmasked_shares
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.sampling import Sampling

CONFIG = dataclasses.replace(tiny.RELATIVE, num_layers=1)
LENGTHS = (9, 5, 1)
BATCH = tiny.one_a_row(tiny.random_examples(3, [(3, length) for length in LENGTHS]), 12)


@functools.partial(jax.jit, static_argnums=(0, 1))  # else every operation is compiled alone
def run(definition, decoder, params, batch):
    return decoder.decode(definition.bind(params), batch, jax.random.key(1))


def decode(decoder, config=CONFIG, batch=BATCH):
    definition, params = tiny.make_model(config)
    return jax.device_get(run(definition, decoder, params, batch))


@pytest.mark.parametrize(
    ("window", "steps", "counts"),
    [
        (4, 2, "even"),
        (4, 9, "even"),
        (3, 3, "even"),
        (20, 4, "even"),
        (4, 2, "linear"),
        (20, 4, "linear"),
        (4, 9, "times"),
        (3, 3, "times"),
    ],
)
def test_a_window_is_written_in_its_steps_before_the_next_begins(window, steps, counts):
    decoded = decode(MaskedDecoder(num_steps=steps, window=window, counts=counts))
    for row, mask, length, taken in zip(decoded.written_at, BATCH.target_mask, LENGTHS, decoded.row_steps, strict=True):
        written = row[mask]
        assert (written >= 0).all() and taken == written.max() + 1 == len(set(written.tolist()))
        for start in range(window, length, window):
            assert written[:start].max() < written[start:].min()
        if counts == "even":
            for start in range(0, length, window):
                _, shares = np.unique(written[start : start + window], return_counts=True)
                assert len(shares) == min(steps, *written[start : start + window].shape)
                assert shares.tolist() == sorted(shares, reverse=True) and shares[0] - shares[-1] <= 1


def test_a_window_as_long_as_the_targets_is_none():
    one, other = (decode(MaskedDecoder(num_steps=3, window=window)) for window in (None, 9))
    np.testing.assert_array_equal(one.canvas, other.canvas)


def test_ends_are_never_written():
    for end in (2, 9):
        decoded = decode(MaskedDecoder(num_steps=2, ends="never", end_ids=(end,)))
        ends = [tiny.VOCABULARY.eos_id, tiny.VOCABULARY.pad_id, end]
        assert not np.isin(decoded.canvas[BATCH.target_mask], ends).any()


def test_the_certainty_of_others_is_without_the_ends():
    logits = np.full((1, 3, 24), -50.0, np.float32)
    logits[0, 0, [3, 4]] = 5.0, 2.0  # 3 ends a text
    logits[0, 1, [3, 4, 5]] = 2.0, 2.5, 1.5
    logits[0, 2, [4, 5]] = 1.0, 0.0
    arguments = jnp.asarray(logits), jax.random.split(jax.random.key(0), 1), jnp.arange(3)[None], tiny.VOCABULARY
    last = jnp.arange(24) == 3
    tokens, log_probability, certainty = propose(*arguments, Sampling(0.0), "confidence", last=last)
    assert tokens.tolist() == [[3, 4, 4]]
    np.testing.assert_allclose(certainty, [[-np.inf, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-1))]], rtol=1e-5)
    np.testing.assert_allclose(log_probability, propose(*arguments, Sampling(0.0), "confidence")[1])


def test_guidance_is_that_of_the_logits():
    """By hand: the first step's tokens are the most likely of `u + (1 + g) (c - u)`."""
    definition, params = tiny.make_model(CONFIG)
    model, vocabulary = definition.bind(params), definition.vocabulary
    guided = decode(MaskedDecoder(num_steps=1, guidance=2.0))

    @jax.jit
    def logits(tokens):
        return model.logits(model(tokens, Slots.of(BATCH), BIDIRECTIONAL).hidden)

    canvas = np.where(BATCH.target_mask, vocabulary.mask_id, BATCH.tokens)
    unread = np.where(BATCH.input_mask, vocabulary.mask_id, canvas)
    seen, unseen = (np.asarray(logits(tokens)) for tokens in (canvas, unread))
    combined = (unseen + 3 * (seen - unseen))[..., : vocabulary.size]
    combined[..., vocabulary.mask_id] = -np.inf
    np.testing.assert_array_equal(guided.canvas[BATCH.target_mask], combined.argmax(-1)[BATCH.target_mask])
    assert (guided.canvas != decode(MaskedDecoder(num_steps=1)).canvas).any()


def test_ancestral_steps_unmask_the_share_of_their_times():
    shares = unmasked_shares(4)
    np.testing.assert_allclose(shares, [0.24975, 0.24975 / 0.75025, 0.24975 / 0.5005, 1], atol=1e-6)
    found = []
    many = tiny.one_a_row(tiny.random_examples(3, [(1, 40)] * 64), 41)
    decoded = decode(AncestralDecoder(num_steps=4), batch=many)
    when = decoded.written_at[many.target_mask]
    for step in range(3):
        found.append((when == step).sum() / (when >= step).sum())
    np.testing.assert_allclose(found, shares[:3], atol=0.04)  # three standard errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedDecoder(window=0), "window must be at least 1, or None; got 0"),
        (lambda: MaskedDecoder(num_steps=None, counts="times"), "counts = 'times' needs num_steps"),
        (lambda: MaskedDecoder(ends="first"), "ends must be one of free, last, never, not 'first'"),
        (lambda: BlockDecoder(4, MaskedDecoder(guidance=1.0)), "inner must have guidance = 0"),
        (lambda: AncestralDecoder(num_steps=0), "num_steps must be at least 1; got 0"),
        (
            lambda: decode(MaskedDecoder(guidance=1.0), dataclasses.replace(CONFIG, logits_softcap=30.0)),
            "guidance must be 0 for a model with ModelConfig.logits_softcap",
        ),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
