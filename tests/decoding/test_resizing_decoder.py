"""Holes of unknown length: a model that knows the right length grows and shrinks to it, and no other can do harm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.resizing import ResizingDecoder, without_gaps
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Output

IDS = tiny.VOCABULARY.for_infilling()
EXPAND, DELETE = IDS.resizing()
MASK = IDS.mask_id
A, B, EOS = 3, 4, 1
ANSWER = [10, 11, 12, 13, 14, 15, 16]  # the first n of them are right, where A stands before the hole n times


def rows(sizes, capacity=6, second=0):
    """Rows `A ... A <hole> B [<hole> B] EOS` with padding; n times A asks for n tokens in the first hole."""
    length = 8 + capacity + second + 1 + 1
    spare = capacity + second
    shape = (len(sizes), length + 4 + spare)
    tokens, target, holes, there = (np.zeros(shape, np.int32) for _ in range(4))
    for row, n in enumerate(sizes):
        text = [A] * n + [0] * capacity + [B] + ([0] * second + [B] if second else []) + [EOS]
        tokens[row, : len(text)] = text
        holes[row, n : n + capacity] = 1
        if second:
            holes[row, n + capacity + 1 :][:second] = 2
        target[row] = holes[row] > 0
        there[row, : length + 4] = 1
        holes[row, length + 4 :] = -1
    positions = np.where(there, np.arange(shape[1]), 0).astype(np.int32)
    return Batch(tokens, target.astype(bool), there, positions, np.arange(len(sizes), dtype=np.int32), holes=holes)


class Knowing:
    """Gives the target of `objectives.resizing` to each mask of the first hole, and deletes those of others."""

    vocabulary, config = IDS, tiny.RELATIVE

    def encode(self, batch):
        return None

    def __call__(self, tokens, slots, kind, encoded=None, dropout_keys=None):
        exists = slots.segment_ids > 0
        # The rows that it sees have no gaps, and as many slots as ever.
        number = jnp.sum(tokens == A, axis=-1, keepdims=True)
        place = jnp.arange(tokens.shape[1]) - number
        first = jnp.cumsum(tokens == B, axis=-1) == 0
        masked = (tokens == MASK) & exists
        here = masked & first
        written = jnp.sum(jnp.isin(tokens, jnp.asarray(ANSWER)) & first, axis=-1, keepdims=True)  # from left to right
        k, n, rank = jnp.sum(here, axis=-1, keepdims=True), number - written, place - written
        token = jnp.asarray(ANSWER)[jnp.clip(place, 0, len(ANSWER) - 1)]
        right = jnp.where((rank == k - 1) & (k < n), EXPAND, jnp.where(rank >= n, DELETE, token))
        logits = 9.0 * jax.nn.one_hot(jnp.where(here, right, DELETE), 32)
        return Output(logits)

    def map_logits(self, fn, hidden, *per_position):
        return fn(hidden, *per_position)


class Insisting(Knowing):
    """Wants one id everywhere, and the next ones less."""

    def __init__(self, *wanted):
        self.wanted = wanted

    def __call__(self, tokens, slots, kind, encoded=None, dropout_keys=None):
        logits = sum(9.0 * (len(self.wanted) - i) * jax.nn.one_hot(t, 32) for i, t in enumerate(self.wanted))
        return Output(jnp.broadcast_to(logits, (*tokens.shape, 32)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode(decoder, model, batch):
    return decoder.decode(model, batch, jax.random.key(0), trace=True)


def text(decoded, row):
    tokens = decoded.tokens[row].tolist()
    return tokens[: tokens.index(EOS) + 1]


KNOWING = Knowing()


SLOW = pytest.mark.slow
STARTS = [(1, None), (3, 0.5), pytest.param(6, None, marks=SLOW), pytest.param(1, 0.5, marks=SLOW)]


@pytest.mark.parametrize(("start", "threshold"), STARTS)
def test_a_hole_grows_and_shrinks_to_the_length_that_the_model_knows(start, threshold):
    batch = rows(range(7))
    decoded = jax.device_get(decode(ResizingDecoder(start_length=start, threshold=threshold), KNOWING, batch))
    for n in range(7):
        assert text(decoded, n) == [A] * n + ANSWER[:n] + [B, EOS]
        # What the row was is still there, behind it padding: its canvas is as long as ever.
        assert not decoded.tokens[n, 2 * n + 2 :].any()
        assert decoded.target_mask[n].tolist() == [n <= slot < 2 * n for slot in range(batch.tokens.shape[1])]
        assert decoded.num_tokens[n] == n and (decoded.written_at[n, n : 2 * n] >= 0).all()
        if threshold is None:  # a mask is added or removed at a time, and then each is written
            assert decoded.row_steps[n] == abs(n - start) + max(n, 0)
    assert not np.isin(decoded.tokens, [MASK, EXPAND, DELETE]).any()
    assert not np.isin(decoded.trace.tokens, [EXPAND, DELETE]).any()
    np.testing.assert_array_equal(decoded.trace.tokens[-1], decoded.tokens)


def test_a_hole_holds_no_more_than_it_may_and_others_keep_their_own():
    decoded = jax.device_get(decode(ResizingDecoder(start_length=2), KNOWING, rows([5, 2, 0], 3, second=4)))
    # Three slots for five tokens: [expand] is barred in the last, so that the model writes its next choice there.
    assert text(decoded, 0)[:7] == [A] * 5 + ANSWER[:2] and text(decoded, 0)[8:] == [B, B, EOS]
    assert text(decoded, 1) == [A, A, *ANSWER[:2], B, B, EOS] and text(decoded, 2) == [B, B, EOS]


@pytest.mark.parametrize(
    ("wanted", "threshold"),
    [
        ((EXPAND, DELETE, 9), None),
        pytest.param((EXPAND, 9, DELETE), 0.0, marks=SLOW),
        pytest.param((DELETE, EXPAND, 9), 0.0, marks=SLOW),
    ],
)
def test_a_model_that_never_has_enough_ends_all_the_same(wanted, threshold):
    decoder = ResizingDecoder(start_length=2, threshold=threshold)
    decoded = jax.device_get(decode(decoder, Insisting(*wanted), rows([1, 2], 5, second=3)))
    assert not np.isin(decoded.tokens, [MASK, EXPAND, DELETE]).any()
    assert decoded.row_steps.max() <= decoder.most_steps(8)
    hole = 0 if DELETE in wanted[:2] else 8  # [expand] until it is full, then tokens
    for row in range(2):
        assert [token for token in text(decoded, row) if token == 9] == [9] * hole
        assert [token for token in text(decoded, row) if token != 9] == [A] * (row + 1) + [B, B, EOS]


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours():
    definition, params = tiny.make_model(dataclasses.replace(tiny.RELATIVE, num_layers=1))
    model = dataclasses.replace(definition, vocabulary=IDS)
    decoder = ResizingDecoder(start_length=2, temperature=1.0)
    run = jax.jit(lambda batch: decoder.decode(model.bind(params), batch, jax.random.key(0)))
    batch = rows([1, 2, 3, 4, 5, 6], 5)
    first, second = (jax.device_get(run(tiny.rows_of(batch, order))) for order in (range(6), [3, 5, 1, 0, 4, 2]))
    np.testing.assert_array_equal(first.tokens[[3, 5, 1, 0, 4, 2]], second.tokens)
    np.testing.assert_allclose(first.scores[[3, 5, 1, 0, 4, 2]], second.scores, rtol=1e-5)
    assert len(set(first.num_tokens.tolist())) > 1


def test_the_model_reads_a_row_without_the_slots_that_hold_nothing():
    batch = rows([2], 4)
    tokens = jnp.asarray(batch.tokens).at[0, 2:6].set(jnp.array([10, MASK, DELETE, DELETE]))
    order, read = without_gaps(batch, tokens, IDS)
    kept = [A, A, 10, MASK, B, EOS]
    assert np.take(np.asarray(tokens[0]), order[0])[:6].tolist() == kept
    # The row has 18 slots, of which the hole has four; spare ones take the place of two.
    assert read.segment_ids[0].tolist() == [1] * 18 + [0] * 4 and read.positions[0, :18].tolist() == list(range(18))
    assert read.target_mask[0].tolist() == [False, False, True, True] + [False] * 18


def test_what_it_refuses():
    with pytest.raises(UserError, match="start_length"):
        ResizingDecoder(start_length=0)
    with pytest.raises(UserError, match="threshold"):
        ResizingDecoder(threshold=2)
    with pytest.raises(UserError, match="no sentinels"):
        dataclasses.replace(tiny.VOCABULARY, resize_ids=None).resizing()
