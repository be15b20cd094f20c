"""Masks of every kind against loops over packed rows."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, CAUSAL, PREFIX, AttentionKind, Slots
from diffusion_t5x.objectives.blocks import clean_and_noisy

LENGTH = 14
BLOCKS = [AttentionKind("block_causal", size, origin) for size in (1, 2, 3, 99) for origin in ("targets", "row")]
KINDS = [CAUSAL, PREFIX, BIDIRECTIONAL, *BLOCKS]


@st.composite
def packed_rows(draw):
    """A row of examples of random sizes: inputs or targets may be missing, and padding may remain at the end."""
    examples, room = [], LENGTH
    for _ in range(draw(st.integers(0, 4))):
        num_inputs = draw(st.integers(0, room))
        num_targets = draw(st.integers(0, room - num_inputs))
        room -= num_inputs + num_targets
        if num_inputs + num_targets:
            examples.append(([5] * num_inputs, [6] * num_targets))
    return examples


def sees(kind, examples, length=LENGTH):
    """The mask of one row, slot by slot, written from the definitions."""
    mask = np.zeros((length, length), bool)
    start = 0
    for inputs, targets in examples:
        size = len(inputs) + len(targets)
        for query in range(size):
            for key in range(size):
                if kind.name == "causal":
                    seen = key <= query
                elif kind.name == "prefix":
                    seen = key <= query or key < len(inputs)
                elif kind.name == "bidirectional":
                    seen = True
                else:
                    origin = len(inputs) if kind.blocks_from == "targets" else 0
                    blocks = [(slot - origin) // kind.block_size for slot in (query, key)]
                    seen = blocks[1] <= blocks[0]
                mask[start + query, start + key] = seen
        start += size
    return mask


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(packed_rows(), min_size=1, max_size=2), st.sampled_from(KINDS))
def test_masks_are_what_their_definitions_say(rows, kind):
    slots = Slots.of(tiny.pack(rows, LENGTH))
    np.testing.assert_array_equal(kind.mask(slots, slots), [sees(kind, examples) for examples in rows])


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(packed_rows())
def test_block_causal_lies_between_causal_and_bidirectional(examples):
    batch = tiny.pack([examples], LENGTH)
    slots, targets = Slots.of(batch), batch.target_mask[0]
    smallest, largest = (AttentionKind("block_causal", size).mask(slots, slots)[0] for size in (1, LENGTH))
    np.testing.assert_array_equal(smallest, CAUSAL.mask(slots, slots)[0])
    np.testing.assert_array_equal(largest[targets], BIDIRECTIONAL.mask(slots, slots)[0][targets])
    assert not largest[~targets][:, targets].any()  # inputs never see what is still to be written


@settings(max_examples=40, deadline=None, derandomize=True)
@given(packed_rows(), st.sampled_from([1, 2, 3, 99]), st.sampled_from(["targets", "row"]))
def test_block_diffusion_over_clean_and_noisy_slots(examples, size, origin):
    examples = [(inputs, targets or [6]) for inputs, targets in examples[:2]]  # inputs alone may come twice or not
    batch, kind = tiny.pack([examples], LENGTH + 2), AttentionKind("block_diffusion", size, origin)
    _, slots = clean_and_noisy(batch, batch.tokens, kind)
    found = np.asarray(kind.mask(slots, slots)[0])
    clean = sees(AttentionKind("block_causal", size, origin), examples, LENGTH + 2)
    targets = batch.target_mask[0]
    # Of one block are two slots that see each other. What shares a block with a target comes twice.
    twice = targets | (clean & clean.T & targets).any(axis=1)
    length = len(clean)
    expected = np.zeros((2 * length, 2 * length), bool)
    expected[:length, :length] = clean
    for query, key in np.argwhere(clean & twice[:, None]):
        same_block = clean[key, query] and twice[key]
        expected[length + query, key] = not same_block
        expected[length + query, length + key] = same_block
    np.testing.assert_array_equal(found, expected)


def test_mask_of_some_queries_is_those_rows_of_the_whole_mask():
    slots = Slots.of(tiny.pack([[([5] * 3, [6] * 4), ([5] * 2, [6] * 3)], [([5] * 5, [6] * 6)]], LENGTH))
    start = np.array([2, 7])
    for kind in KINDS:
        whole = kind.mask(slots, slots)
        some = kind.mask(slots.take(jnp.asarray(start), 4), slots)
        np.testing.assert_array_equal(some, [whole[row, first : first + 4] for row, first in enumerate(start)])


@pytest.mark.parametrize(
    "arguments", [("causa",), ("block_causal",), ("causal", 4), ("block_causal", 0), ("block_diffusion",)]
)
def test_impossible_kinds_are_refused(arguments):
    with pytest.raises(UserError):
        AttentionKind(*arguments)
