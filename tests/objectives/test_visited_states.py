"""The states that distillation trains on: those that the decoder saw, or random ones."""

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x.objectives.distillation import Distillation, visited_states
from diffusion_t5x.objectives.texts import random_states

VOCABULARY = tiny.VOCABULARY
MASK, EOS = VOCABULARY.mask_id, VOCABULARY.eos_id
# Two rows, of two inputs and six targets, and of none and five; an EOS in the first.
BATCH = tiny.one_a_row([([3, 4], [5, 6, 7, 8, EOS, 10]), ([], [11, 12, 13, 14, 15])]).replace(
    written_at=np.array([[-1, -1, 0, 1, 1, 3, 2, 0], [1, 0, 0, 0, 0, -1, -1, -1]], np.int32)
)
STATES = {  # by block, of three targets: every state with something masked
    (0, 0): [[MASK, MASK, MASK], [5, MASK, MASK]],
    (0, 1): [[MASK, MASK, MASK], [MASK, MASK, 10], [MASK, MASK, 10], [MASK, EOS, 10]],
    (1, 0): [[MASK, MASK, MASK], [MASK, 12, 13]],
    (1, 1): [[MASK, MASK]],
}


# Else every operation is compiled alone.
visited = jax.jit(visited_states, static_argnums=(1, 2, 4))
masked_at_random = jax.jit(random_states, static_argnums=(1, 2, 4))


def block_of(noisy, row, block):
    start = (2 if row == 0 else 0) + 3 * block
    return noisy[row, start : start + len(STATES[row, block][0])].tolist()


def test_visited_states_of_blocks_from_the_row():
    """The first row's two inputs share a block of three with its first target."""
    draw = jax.vmap(lambda key: visited(BATCH, VOCABULARY, 3, key, "row"))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    assert (drawn[:, 0, :2] == [3, 4]).all() and (drawn[:, 0, 2] == MASK).all()
    found = {tuple(row) for row in drawn[:, 0, 3:6]}
    # Targets 1, 2 and 3 of the row were written in steps 1, 1 and 3.
    assert found == {(MASK, MASK, MASK), (6, 7, MASK)}
    assert {tuple(row) for row in drawn[:, 0, 6:8]} == {(MASK, MASK), (MASK, 10)}


def test_visited_states_are_those_of_the_decoder_each_as_likely():
    draw = jax.jit(lambda key: visited_states(BATCH, VOCABULARY, 3, key))
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000)))
    for (row, block), states in STATES.items():
        found = [tuple(block_of(noisy, row, block)) for noisy in drawn]
        assert set(found) == set(map(tuple, states))
        for state in map(tuple, states):
            share = list(map(tuple, states)).count(state) / len(states)
            assert found.count(state) / 4000 == pytest.approx(share, abs=0.035)  # over four standard errors
    # Blocks draw apart: how often both blocks of the first row are wholly masked.
    together = [block_of(n, 0, 0) == [MASK] * 3 and block_of(n, 0, 1) == [MASK] * 3 for n in drawn]
    assert np.mean(together) == pytest.approx(1 / 8, abs=0.025)
    np.testing.assert_array_equal(drawn[:, 0, :2], [[3, 4]] * 4000)


def test_a_row_that_nobody_wrote_has_random_masks_among_those_that_the_student_wrote():
    batch = tiny.one_a_row([([3, 4], [5, 6, 7, 8, 9, 10])] * 2)
    batch = batch.replace(written_at=np.array([[-1, -1, 0, 0, 0, 0, 0, 0], [-1] * 8], np.int32))
    definition, _ = tiny.make_model(tiny.LLAMA)
    draw = jax.jit(lambda key: Distillation(3).model_inputs(definition, batch, key))
    drawn = np.stack([draw(jax.random.key(seed)) for seed in range(20)])[:, :, 2:] == MASK
    assert drawn[:, 0].all()  # written in one step: everything was masked
    assert 0.3 < drawn[:, 1].mean() < 0.9 and drawn[:, 1].reshape(20, 2, 3).any(axis=2).all()


def test_random_states_have_any_number_of_masks_alike_but_none():
    """The released code draws a share from [0, 1], then each mask, and forces one where there is none.

    Of three targets 0 to 3 are masked with probability 1/4 each, so 1, 2 and 3 with 1/2, 1/4 and 1/4. The forced one is
    any of them: each is masked with probability 1/2 + 1/12.
    """
    batch = tiny.one_a_row([([3, 4], [5, 6, 7])] * 6000)
    drawn = np.asarray(masked_at_random(batch, VOCABULARY, 3, jax.random.key(0)))
    assert (drawn[:, :2] == [3, 4]).all() and np.isin(drawn[:, 2:], [5, 6, 7, MASK]).all()
    masked = drawn[:, 2:] == MASK
    counts = np.bincount(masked.sum(axis=1), minlength=4) / 6000
    np.testing.assert_allclose(counts, [0, 1 / 2, 1 / 4, 1 / 4], atol=0.025)  # four standard errors of 1/2
    np.testing.assert_allclose(masked.mean(axis=0), 7 / 12, atol=0.026)
    # A last block of two targets, and blocks that begin with inputs.
    whole = tiny.one_a_row([([3], [5, 6, 7, 8, 9])] * 200)
    by_targets, by_row = (
        np.asarray(masked_at_random(whole, VOCABULARY, 3, jax.random.key(1), origin)) == MASK
        for origin in ("targets", "row")
    )
    assert by_targets[:, 1:4].any(axis=1).all() and by_targets[:, 4:6].any(axis=1).all()
    assert by_row[:, 1:3].any(axis=1).all() and by_row[:, 3:6].any(axis=1).all()
    assert not by_targets[:, 0].any() and not by_row[:, 0].any()
