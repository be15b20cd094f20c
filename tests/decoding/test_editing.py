"""Token editing, against the published loop in plain Python."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.editing import EditingDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Output

MASK = tiny.VOCABULARY.mask_id
BATCH = tiny.one_a_row([*tiny.random_examples(0, [(2, 7), (3, 6), (0, 8), (4, 1)]), ([], [])], length=10)
RNG = np.random.default_rng(5)
PLACES, TABLE = RNG.standard_normal((10, 32)).astype(np.float32), 2 * RNG.standard_normal((32, 32)).astype(np.float32)


class Neighbours(tiny.TableModel):
    """The logits of a position are a sum of what the place and the token before it say."""

    def __call__(self, tokens, slots, kind, encoded=None, dropout_keys=None):
        return Output(jnp.asarray(PLACES) + jnp.asarray(TABLE)[jnp.roll(tokens, 1, -1)])


def probabilities(canvas):
    read = np.where((canvas == MASK) & (np.arange(10) == 0), tiny.VOCABULARY.start_id, canvas)
    logits = (PLACES + TABLE[np.roll(read, 1)]).astype(np.float64)[:, :MASK]
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def written_by_hand(canvas, targets, decoder):
    """The row after the last step, the steps, and the number of edits."""
    extra, steps, num_edits = 0, 0, 0
    while True:
        masked = [place for place in targets if canvas[place] == MASK]
        extra += not masked
        if extra > decoder.extra_steps or not len(targets):
            break
        found = probabilities(canvas)
        steps, tokens, sure = steps + 1, found.argmax(-1), found.max(-1)
        above = [place for place in masked if sure[place] > decoder.threshold]
        least = decoder.min_tokens
        if decoder.num_steps:
            least = max(least, math.ceil(len(masked) / max(decoder.num_steps - (steps - 1), 1)))
        if len(above) < least:
            above = sorted(masked, key=lambda place: -sure[place])[:least]
        edits = [
            place
            for place in targets
            if canvas[place] not in (MASK, tokens[place]) and sure[place] > decoder.editing_threshold
        ]
        for place in above + edits:
            canvas[place] = tokens[place]
        num_edits += len(edits)
        if not masked and not edits:
            break
    return canvas, steps, num_edits


@pytest.mark.parametrize(
    "decoder",
    [
        EditingDecoder(0.4, 0.3, extra_steps=4),
        EditingDecoder(0.6, 0.5, min_tokens=2, extra_steps=2),
        EditingDecoder(0.4, 0.0, extra_steps=1),
        EditingDecoder(0.9, 0.3, num_steps=3, extra_steps=2),
    ],
    ids=str,
)
def test_a_row_is_written_and_edited_as_by_the_published_loop(decoder):
    decode = jax.jit(lambda batch: decoder.decode(Neighbours(TABLE), batch, jax.random.key(0), trace=True))
    decoded = jax.device_get(decode(BATCH))
    edited = 0
    for row, targets in enumerate(BATCH.target_mask):
        canvas = np.where(targets, MASK, BATCH.tokens[row])
        canvas, steps, num_edits = written_by_hand(canvas, np.flatnonzero(targets), decoder)
        np.testing.assert_array_equal(decoded.canvas[row], canvas)
        assert decoded.row_steps[row] == steps <= decoder.most_steps(len(targets))
        edited += num_edits
        log_probabilities = np.log(decoded.trace.confidence[-1][row][targets])
        np.testing.assert_allclose(decoded.scores[row], log_probabilities.sum() / max(targets.sum(), 1), rtol=1e-4)
    assert edited > 3


def test_without_edits_it_is_a_threshold():
    model = Neighbours(TABLE)
    one, other = (
        jax.device_get(jax.jit(lambda batch, rule=rule: rule.decode(model, batch, jax.random.key(0)))(BATCH))
        for rule in (EditingDecoder(0.4, 1.0), MaskedDecoder(None, threshold=0.4))
    )
    np.testing.assert_array_equal(one.canvas, other.canvas)
    np.testing.assert_array_equal(one.row_steps, other.row_steps + (other.row_steps > 0))  # and one that edits nothing


def test_in_blocks_only_the_present_block_is_edited():
    definition, params = tiny.make_model(dataclasses.replace(tiny.LLAMA, num_layers=1))
    decoder = BlockDecoder(3, EditingDecoder(0.3, 0.1, extra_steps=3), "row")
    decoded = jax.device_get(
        jax.jit(lambda batch: decoder.decode(definition.bind(params), batch, jax.random.key(0), trace=True))(BATCH)
    )
    tokens = decoded.trace.tokens
    changed = tokens[1:] != tokens[:-1]
    assert (changed & (tokens[:-1] != MASK)).any()
    blocks = np.broadcast_to(BATCH.positions // 3, changed.shape)
    for step in changed:
        for row, blocks_of in zip(step, blocks[0], strict=True):
            assert len(set(blocks_of[row].tolist())) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.2}, r"EditingDecoder\.threshold must be a probability; got 1\.2"),
        ({"editing_threshold": -0.1}, r"editing_threshold must be a probability; got -0\.1"),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ({"extra_steps": 0}, "extra_steps must be at least 1; got 0"),
        ({"min_tokens": 0}, "min_tokens must be at least 1; got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        EditingDecoder(**settings)
