"""Runs of masks of another length than their tokens: the targets, worked out by hand, and how often they occur."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.resizing import Resizing, resize

VOCABULARY = tiny.VOCABULARY
EXPAND, DELETE = VOCABULARY.resizing()
MASK = VOCABULARY.mask_id
# Two inputs, a text of five tokens, EOS and two of padding: a canvas of eight.
TEXT = [5, 6, 7, 8, 9]
BATCH = tiny.one_a_row([([3, 4], [*TEXT, 1, 0, 0])])


@pytest.mark.parametrize(
    ("masked", "sizes", "targets"),
    [
        # Three masks for 6 7 8: as many, two, one, four, five. EOS and padding follow.
        ((3, 4, 5), {6: 3}, "5 *6 *7 *8 9 1 0 0"),
        ((3, 4, 5), {6: 2}, "5 *6 *E 9 1 0 0 0"),
        ((3, 4, 5), {6: 1}, "5 *E 9 1 0 0 0 0"),
        ((3, 4, 5), {6: 4}, "5 *6 *7 *8 *D 9 1 0"),
        ((3, 4, 5), {6: 5}, "5 *6 *7 *8 *D *D 9 1"),
        # There is room for two more masks, not for three.
        ((3, 4, 5), {6: 6}, "5 *6 *7 *8 *D *D 9 1"),
        # Masks for nothing, and two runs, of which one grows and one shrinks.
        ((), {4: 2}, "5 6 *D *D 7 8 9 1"),
        ((2, 3, 5, 6), {4: 1, 7: 3}, "*E 7 *8 *9 *D 1 0 0"),
        ((2, 3, 5), {4: 3, 6: 2}, "*5 *6 *D 7 *8 *D 9 1"),
    ],
)
def test_what_a_run_of_masks_stands_for(masked, sizes, targets):
    row = jnp.zeros(BATCH.tokens.shape, bool).at[0, list(masked)].set(True)
    length = BATCH.tokens.shape[1]
    before = [next((n for n in range(slot + 1) if slot - 1 - n not in masked), 0) for slot in range(length)]
    wanted = jnp.array([[sizes.get(slot, before[slot]) for slot in range(length)]], jnp.int32)
    found, found_masked, _ = resize(BATCH, row, wanted, VOCABULARY)
    signs = {"E": EXPAND, "D": DELETE}
    words = targets.split()
    assert found.tokens[0].tolist() == [3, 4, *(signs.get(w.strip("*"), None) or int(w.strip("*ED")) for w in words)]
    assert found_masked[0].tolist() == [False, False, *(w.startswith("*") for w in words)]
    assert found.target_mask[0].tolist() == [False] * 2 + [True] * 8
    assert found.segment_ids.tolist() == [[1] * 10] and found.positions.tolist() == [list(range(10))]
