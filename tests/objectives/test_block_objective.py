"""Block diffusion's one pass over clean and noisy targets, against a pass of its own for every block."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, AttentionKind, Slots
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.blocks import block_starts, clean_and_noisy

# Packed examples, one without inputs, and a row with padding.
ROWS = [tiny.random_examples(0, [(3, 5), (0, 4), (1, 6)]), tiny.random_examples(1, [(2, 7)])]
PACKED = tiny.pack(ROWS, 20)
DEFINITION = ModelDefinition(tiny.RELATIVE, tiny.VOCABULARY)
MASK = tiny.VOCABULARY.mask_id
ORIGINS = ["targets", "row"]
ALL_MASKED = 1 - 2.0**-20  # as epsilon: every time is next to 1


def first_targets(batch):
    """Row index of the first target of the segment that each slot is in, by loops."""
    found = np.zeros_like(batch.tokens)
    for row, slot in np.argwhere(batch.segment_ids > 0):
        same = batch.segment_ids[row] == batch.segment_ids[row, slot]
        found[row, slot] = np.flatnonzero(same & batch.target_mask[row])[0]
    return found


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_blocks_are_counted_from_each_first_target_or_each_first_token(size, origin):
    starts = np.asarray(block_starts(PACKED, size, origin))
    first = first_targets(PACKED)
    for row, slot in np.argwhere(PACKED.target_mask):
        counted_from = first[row, slot] if origin == "targets" else slot - PACKED.positions[row, slot]
        expected = counted_from + (slot - counted_from) // size * size
        assert starts[row, slot] == max(expected, first[row, slot])


# Else every operation is compiled alone.
model_inputs = jax.jit(Block.model_inputs, static_argnums=(0, 1))


@pytest.mark.parametrize(
    "origin,size,config",
    [
        ("targets", 1, tiny.RELATIVE),
        ("targets", 3, tiny.LLAMA),
        ("targets", 3, tiny.GPT2),
        ("targets", 16, tiny.RELATIVE),
        ("row", 1, tiny.LLAMA),
        ("row", 3, tiny.RELATIVE),
        ("row", 3, tiny.LLAMA),
        ("row", 16, tiny.GPT2),
    ],
)
def test_noisy_logits_are_those_of_a_pass_for_each_block(origin, size, config):
    """In which the block is noisy, what is before it clean, and what is behind it nonsense."""
    definition, params = tiny.make_model(config)
    model, kind = definition.bind(params), AttentionKind("block_causal", size, origin)
    objective = Block(size, blocks_from=origin)
    noisy = np.asarray(model_inputs(objective, DEFINITION, PACKED, jax.random.key(0)))
    assert 0.2 < (noisy == MASK)[PACKED.target_mask].mean() < 0.95

    @jax.jit
    def together():
        in_one = AttentionKind("block_diffusion", size, origin)
        tokens, slots = clean_and_noisy(PACKED, noisy, in_one)
        return model.logits(model(tokens, slots, in_one).hidden)[:, noisy.shape[1] :]

    @jax.jit
    def alone(tokens):
        return model.logits(model(tokens, Slots.of(PACKED), kind).hidden)

    found, starts = np.asarray(together()), np.asarray(block_starts(PACKED, size, origin))
    slots = np.arange(noisy.shape[1])
    for row in range(len(noisy)):
        for start in np.unique(starts[row][PACKED.target_mask[row]]):
            block = (starts[row] == start) & PACKED.target_mask[row]
            later = PACKED.target_mask[row] & (slots > start) & ~block
            tokens = PACKED.tokens.copy()
            tokens[row] = np.where(block, noisy[row], np.where(later, 21, tokens[row]))
            np.testing.assert_allclose(found[row][block], np.asarray(alone(tokens))[row][block], rtol=1e-4, atol=1e-5)


def test_one_block_without_inputs_is_bidirectional():
    batch = tiny.one_a_row(tiny.random_examples(2, [(0, 6), (0, 6)]))
    definition, params = tiny.make_model()
    model = definition.bind(params)
    noisy = model_inputs(Block(6), DEFINITION, batch, jax.random.key(1))
    kind = AttentionKind("block_diffusion", 6)

    @jax.jit
    def both():
        tokens, slots = clean_and_noisy(batch, noisy, kind)
        found = model(tokens, slots, kind).hidden[:, 6:]
        return found, model(noisy, Slots.of(batch), BIDIRECTIONAL).hidden

    np.testing.assert_allclose(*both(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softmax", ["allowed", "all"])
def test_at_size_1_with_all_masked_the_loss_is_the_likelihood_by_the_models_own_conditionals(softmax):
    """Over all texts of 4 tokens out of 3 the probabilities sum to 1, less what MASK has of them."""
    vocabulary = dataclasses.replace(tiny.VOCABULARY, size=4, mask_id=3, noise_ranges=((0, 3),))
    definition = ModelDefinition(dataclasses.replace(tiny.RELATIVE, vocab_size=4), vocabulary)
    params = tiny.random_params(definition)
    model, kind = definition.bind(params), AttentionKind("block_causal", 1)
    texts = np.array(list(itertools.product(range(3), repeat=4)))
    batch = tiny.one_a_row([([2], text.tolist()) for text in texts])

    @jax.jit
    def log_probabilities(position):
        """Log-probability of each text's token at a position, given those before it; it is read as MASK."""
        tokens = jnp.asarray(batch.tokens).at[:, 1 + position].set(3)
        logits = model.logits(model(tokens, Slots.of(batch), kind).hidden)[:, 1 + position]
        logits = logits if softmax == "all" else forbid(logits, vocabulary)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(texts)[:, position, None], axis=-1)[:, 0]

    likelihood = sum(np.asarray(log_probabilities(position)) for position in range(4))
    total = np.exp(likelihood).sum()
    assert total == pytest.approx(1, abs=1e-5) if softmax == "allowed" else total < 0.9
    objective = Block(1, epsilon=ALL_MASKED, softmax=softmax)
    loss = jax.jit(lambda batch: objective.loss(model, batch, jax.random.key(0), train=False).loss.mean())
    for row in range(0, 81, 16):
        assert 4 * loss(tiny.rows_of(batch, [row])) == pytest.approx(-likelihood[row], rel=1e-5)
    assert 4 * loss(batch) == pytest.approx(-likelihood.mean(), rel=1e-5)


@pytest.mark.parametrize("noise", ["mask", "uniform"])
def test_noise_lies_on_targets_alone_at_a_level_of_each_block(noise):
    rows = [[example] for example in tiny.random_examples(3, [(2, 12)] * 2000)]
    batch = tiny.pack(rows, 14)
    objective = Block(4, noise=noise, weighting="uniform")
    noisy = np.asarray(model_inputs(objective, DEFINITION, batch, jax.random.key(0)))
    changed = noisy != batch.tokens
    assert not changed[~batch.target_mask].any()
    assert (noisy[changed] == MASK).all() if noise == "mask" else not (noisy == MASK).any()
    blocks = changed[:, 2:].reshape(2000, 3, 4).sum(-1)
    # Each has a uniform level of its own, so 0 to 4 changed tokens are equally likely.
    chance = 1 if noise == "mask" else 1 - 1 / len(tiny.VOCABULARY.noise_ids())
    assert changed[:, 2:].mean() == pytest.approx(chance / 2, abs=0.01)
    if noise == "mask":
        counts = np.bincount(blocks.ravel(), minlength=5) / blocks.size
        np.testing.assert_allclose(counts, 0.2, atol=0.03)


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"block_size": 0}, {"noise": "gauss"}, {"noise": "uniform"}, {"epsilon": 1.0}, {"schedule": "x"}):
        with pytest.raises(UserError):
            Block(**settings)
