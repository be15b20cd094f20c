"""Shares of the training data: whoever reads them, the batches as a whole are the same, and so is where they stand."""

import itertools

import numpy as np
import pytest

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError
from diffusion_t5x.training.host_batches import HostBatches

ROWS = 12


class Shard:
    """Counts: the token of a row says shard, batch and row of the shard."""

    def __init__(self, num_shards, index):
        self.size, self.index, self.num_shards, self.next = ROWS // num_shards, index, num_shards, 0

    def __next__(self):
        rows = np.arange(self.size)
        tokens = (100 * self.next + self.index * self.size + rows)[:, None].astype(np.int32)
        self.next += 1
        ids = (self.index * self.size + rows).astype(np.int32)
        return Batch(tokens, np.ones_like(tokens, bool), np.ones_like(tokens), np.zeros_like(tokens), ids)

    def state_dict(self):
        return {"source": np.array([self.num_shards, self.index]), "next": np.int32(self.next)}

    def load_state_dict(self, state):
        assert state["source"].tolist() == [self.num_shards, self.index]
        self.next = int(state["next"])


def all_shares(number):
    return [HostBatches(Shard, ROWS, (share, number)) for share in range(number)]


def whole(shares):
    parts = [next(share) for share in shares]
    return np.concatenate([part.tokens for part in parts])[:, 0], np.concatenate([part.example_ids for part in parts])


def positions(shares):
    """The positions that the processes would have gathered."""
    return dict(itertools.chain.from_iterable(share.state_dict().items() for share in shares))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_shares_make_the_batch(number):
    shares = all_shares(number)
    for step in range(3):
        tokens, ids = whole(shares)
        assert tokens.tolist() == [100 * step + row for row in range(ROWS)]
        assert ids.tolist() == list(range(ROWS))


@pytest.mark.parametrize("before,after", itertools.product([1, 2, 3, 4], repeat=2))
def test_other_processes_go_on_with_the_same_examples(before, after):
    first = all_shares(before)
    for _ in range(5):
        whole(first)
    second = all_shares(after)
    for share in second:
        share.load_state_dict(positions(first))
    for _ in range(2):
        for one, other in zip(whole(first), whole(second), strict=True):
            np.testing.assert_array_equal(one, other)
    assert positions(first).keys() == positions(second).keys()  # shards stay: a third set of processes goes on, too
    assert all(np.array_equal(x, positions(second)[name]) for name, x in positions(first).items())


def test_shares_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(UserError, match="12 does not divide into 5 shards"):
        HostBatches(Shard, ROWS, (0, 5))
    with pytest.raises(UserError, match="no longer supported"):
        HostBatches(Shard, ROWS).load_state_dict({"source": np.zeros(2)})


def test_data_without_a_position_begin_anew():
    class NoPosition(Shard):
        def state_dict(self):
            return {}

    batches = HostBatches(NoPosition, ROWS)
    first = next(batches)
    assert batches.state_dict() == {}
    again = HostBatches(NoPosition, ROWS)
    again.load_state_dict({})
    np.testing.assert_array_equal(next(again).tokens, first.tokens)
