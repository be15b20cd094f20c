"""Texts that the student writes for itself: prompts, lengths, positions in the data, and a teacher that stays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.distillation import Distillation, Teacher
from diffusion_t5x.partitioning import MeshConfig, put_batch
from diffusion_t5x.training.rollout import OnPolicyBatches, Rollout, make_rollout_step, prompts
from diffusion_t5x.training.state import TrainState
from diffusion_t5x.training.step import make_train_step

MASK = tiny.VOCABULARY.mask_id
DECODER = BlockDecoder(3, MaskedDecoder(num_steps=3, temperature=1.0))
ROLLOUT = Rollout(DECODER, num_batches=3, min_length=4, max_length=10, growth_steps=6, num_buckets=2)


class Prompts:
    """Four prompts a batch, for ever; the position is the number of the next batch."""

    def __init__(self):
        self.next = 0

    def __next__(self):
        sizes = [((self.next + row) % 6, 3) for row in range(4)]
        self.next += 1
        return tiny.one_a_row(tiny.random_examples(self.next, sizes), length=8)

    def state_dict(self):
        return {"next": np.array(self.next)}

    def load_state_dict(self, state):
        self.next = int(state["next"])


@given(st.data())
def test_prompts_are_inputs_with_an_empty_canvas(data):
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=3))
    length, room = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3))
    examples = tiny.random_examples(0, sizes)
    batch = prompts(tiny.one_a_row(examples, length=9), 5, length, length + room)
    expected = tiny.one_a_row([(inputs, [0] * length) for inputs, _ in examples], length=5 + length + room)
    jax.tree.map(np.testing.assert_array_equal, batch, expected)


def test_lengths_grow_in_a_straight_line_and_have_few_sizes():
    published = Rollout(DECODER)
    assert [published.length(step) for step in (0, 1, 50, 100, 9999)] == [100, 139, 2050, 4000, 4000]
    assert {published.bucket(length) for length in range(100, 4001)} == {500, 1000, 2000, 4000}
    assert all(published.bucket(length) >= length for length in range(100, 4001))
    assert dataclasses.replace(ROLLOUT, growth_steps=0).length(0) == 10


def make_batches(mesh=None, num_inputs=5):
    definition, params = tiny.make_model(tiny.LLAMA)
    mesh = mesh or MeshConfig(data=1, fsdp=1, tensor=1).make()
    batches = OnPolicyBatches(mesh, definition, ROLLOUT, Prompts(), num_inputs=num_inputs, batch_size=4, seed=7)
    return batches, state_of(params)


def state_of(params, step=0):
    return TrainState(step=jnp.int32(step), params=params, opt_state=())


def take(batches, state, count):
    return [batches.next_batch(state.replace(step=jnp.int32(i))) for i in range(count)]


def test_texts_are_what_the_student_decodes():
    batches, state = make_batches()
    taken = take(batches, state, 6)
    source = Prompts()
    for number, batch in enumerate(taken):
        given = next(source)
        inputs = [row[mask].tolist() for row, mask in zip(given.tokens, given.input_mask, strict=True)]
        assert [row[mask].tolist() for row, mask in zip(batch.tokens, batch.input_mask, strict=True)] == inputs
        assert batch.example_ids.tolist() == [0, 1, 2, 3]
        assert not (batch.tokens == MASK).any()
        assert ((batch.written_at >= 0) == batch.target_mask).all()
        # Three batches at a time, as long as the schedule says at the first of them: 4, and 4 + 6 / 2.
        assert batch.target_mask.sum(axis=1).max() <= (4 if number < 3 else 7)
        assert batch.tokens.shape[1] == (5 + 5 if number < 3 else 5 + 10)
    assert len({batch.tokens[:, -5:].tobytes() for batch in taken}) == 6  # each row has draws of its own


def test_a_resumed_run_goes_on_with_the_texts_that_were_written():
    batches, state = make_batches()
    take(batches, state, 1)
    stored = batches.state_dict()
    assert all(isinstance(value, np.ndarray) and "/" not in name for name, value in stored.items())
    resumed, _ = make_batches()
    resumed.load_state_dict(stored)
    other = jax.tree.map(lambda x: x + 1, state.params)  # of a later step: not what the rest was written with
    for step in (1, 2):
        expected, found = (x.next_batch(state_of(other, step)) for x in (batches, resumed))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(
        np.testing.assert_array_equal,
        resumed.next_batch(state_of(other, 3)),
        batches.next_batch(state_of(other, 3)),
    )


def test_the_teacher_stays_as_it_is_and_the_student_learns():
    """Ten steps on one rollout: the same bits in the teacher, whose buffers are its own, and a lower loss."""
    mesh = MeshConfig(data=1, fsdp=1, tensor=1).make()
    definition, params = tiny.make_model(tiny.LLAMA)
    optimizer = optax.adam(1e-2)
    abstract, state = tiny.fresh_state(mesh, definition, optimizer)
    place = lambda tree: jax.tree.map(lambda x, at: jax.device_put(jnp.copy(x), at.sharding), tree, abstract.params)  # noqa: E731
    teacher = Teacher(definition, place(params))  # equal to the student at first, in buffers of its own
    before = jax.device_get(teacher.params)
    step = make_train_step(mesh, abstract, definition, Distillation(3), optimizer, seed=0, teacher=teacher)
    batches, _ = make_batches(mesh)
    batch = put_batch(mesh, batches.next_batch(state))
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher.params), before)
    assert losses[-1] < losses[0]
    student = jax.device_get(state.params)
    assert all(np.any(x != y) for x, y in zip(jax.tree.leaves(student), jax.tree.leaves(before), strict=True))


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"decoder": BlockDecoder(3, SundaeDecoder(num_samples=1))}, "masked blocks"),
        ({"min_length": 11}, "min_length must not exceed"),
        ({"num_buckets": 0}, "at least 1"),
    ],
)
def test_mistakes(wrong, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ROLLOUT, **wrong)


def test_the_draws_of_a_rollout_are_not_those_of_another_step():
    definition, params = tiny.make_model(tiny.LLAMA)
    write = make_rollout_step(MeshConfig(data=1, fsdp=1, tensor=1).make(), definition, DECODER, seed=0)
    batch = prompts(next(Prompts()), 5, 6, 6)
    first, again, other = (np.asarray(write(params, batch, step).tokens) for step in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
