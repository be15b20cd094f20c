"""Runs of masks of another length than their tokens: the targets, worked out by hand, and how often they occur."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.defaults import default_decoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.resizing import ResizingDecoder
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
    assert found.tokens[0].tolist() == [3, 4, *(signs.get(w.strip("*")) or int(w.strip("*ED")) for w in words)]
    assert found_masked[0].tolist() == [False, False, *(w.startswith("*") for w in words)]
    assert found.target_mask[0].tolist() == [False] * 2 + [True] * 8
    assert found.segment_ids.tolist() == [[1] * 10] and found.positions.tolist() == [list(range(10))]


CANVAS = tiny.one_a_row([([3], [10, 11, 12, 13, 14, 1, *[0] * 20])] * 400)


def states(objective):
    found, tokens, _ = objective._corrupt(VOCABULARY, CANVAS, jax.random.key(0))
    return np.asarray(found.tokens), np.asarray(tokens), np.asarray(found.target_mask)


@pytest.mark.slow
def test_every_state_is_the_text_but_for_what_its_runs_say():
    targets, noisy, target_mask = states(Resizing(hole_share=1.0, epsilon=0.3))
    seen = noisy != MASK
    assert (noisy[seen] == targets[seen]).all() and seen[:, 0].all()
    assert not target_mask[:, 0].any() and target_mask[:, 1:].all()
    letters = {token: chr(token + 55) for token in range(10, 15)} | {1: "$", 0: ".", EXPAND: "+", DELETE: "-"}
    for row, visible in zip(targets[:, 1:].tolist(), seen[:, 1:], strict=True):
        text = "".join(letters[token] for token in row)
        # [delete] is the end of its run, and [expand] is; without the former, and with the rest in place of the latter,
        # this is the text.
        for slot, sign in enumerate(text):
            if sign in "+-":
                assert not visible[slot] and (visible[slot + 1] or text[slot + 1] == sign == "-")
        pattern = text.replace("-", "").replace("+", "[A-E]{2,}").replace("$", r"\$").rstrip(".")
        assert re.fullmatch(pattern, "ABCDE$"), text
    shares = [np.mean((targets == state).any(axis=1)) for state in (EXPAND, DELETE)]
    assert 0.1 < shares[0] < 0.5 and 0.3 < shares[1] < 0.9


@pytest.mark.slow
def test_without_holes_it_is_masked():
    found, tokens, weights = Resizing(hole_share=0.0)._corrupt(VOCABULARY, CANVAS, jax.random.key(0))
    _, others, other_weights = Masked()._corrupt(VOCABULARY, CANVAS, jax.random.key(0))
    np.testing.assert_array_equal(tokens, others)
    np.testing.assert_array_equal(weights, other_weights)
    np.testing.assert_array_equal(found.tokens, CANVAS.tokens)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_targets_that_are_no_text_have_no_bound(share):
    nothing = jnp.zeros(CANVAS.tokens.shape)
    sums = Resizing(hole_share=share)._sums(CANVAS, nothing > 0, nothing, nothing, nothing > 0, {})
    assert ("nll_bound" in sums.metrics) == (share == 0)


def test_what_it_refuses():
    with pytest.raises(UserError, match="hole_share must lie in"):
        Resizing(hole_share=2)
    with pytest.raises(UserError, match="no sentinels"):
        Resizing()._corrupt(dataclasses.replace(VOCABULARY, resize_ids=None), CANVAS, jax.random.key(0))


def test_a_model_of_masked_diffusion_does_not_resize():
    (use,) = ResizingDecoder().modes
    assert any(mode.serves(use) for mode in Resizing().modes)
    assert not any(mode.serves(use) for mode in Masked().modes)
    assert any(mode.serves(use) for mode in Resizing().modes for use in MaskedDecoder().modes)
    assert default_decoder(use) == ResizingDecoder()
