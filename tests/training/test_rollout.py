"""Texts that the student writes for itself: prompts, lengths, positions in the data, and a teacher that stays."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from diffusion_t5x.data.dataset import OfTexts
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.plain_vocabularies import ByteVocabulary
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.remasking import RemaskingDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.autoregressive_policy_gradient import AutoregressivePolicyGradient
from diffusion_t5x.objectives.distillation import Distillation, Teacher
from diffusion_t5x.objectives.masked_policy_gradient import MaskedPolicyGradient
from diffusion_t5x.objectives.policy_gradient import PolicyGradient
from diffusion_t5x.objectives.sandwiched import SandwichedPolicyGradient
from diffusion_t5x.objectives.sundae_policy_gradient import SundaePolicyGradient
from diffusion_t5x.partitioning import MeshConfig, put_batch
from diffusion_t5x.training.ramps import Ramp
from diffusion_t5x.training.rewards import Grader, Rewards
from diffusion_t5x.training.rollout import OnPolicyBatches, Rollout, check_rollout
from diffusion_t5x.training.rollout_texts import prompts
from diffusion_t5x.training.state import TrainState
from diffusion_t5x.training.step import make_train_step

MASK = tiny.VOCABULARY.mask_id
DECODER = BlockDecoder(3, MaskedDecoder(num_steps=3, temperature=1.0))
ROLLOUT = Rollout(DECODER, num_batches=3, batches_at_once=3, lengths=Ramp(3, 9, 6, "linear"), num_buckets=2)


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


def released_length(rl_step, kind):
    """The maximum length in the released code, `_get_scheduled_max_token` of rl.py; its RL steps count from 1."""
    progress = min(rl_step / 100, 1.0)
    if kind == "linear":
        frac = progress
    elif kind == "sin":
        frac = math.sin(math.pi / 2 * progress)
    else:
        frac = 1.0 - math.cos(math.pi / 2 * progress)
    return max(int(round((100 + (4000 - 100) * frac) / 4) * 4), 4)


def test_lengths_are_those_of_the_released_code_and_have_few_sizes():
    published = Rollout(BlockDecoder(4, MaskedDecoder(num_steps=4)))
    found = [published.length(number) for number in (0, 1, 2, 6, 7, 50, 99, 9999)]
    assert found == [100, 100, 104, 124, 132, 1284, 4000, 4000]
    for shape in ("cos", "sin", "linear"):
        lengths = dataclasses.replace(published, lengths=Ramp(100, 4000, 100, shape))
        assert [lengths.length(n) for n in range(150)] == [released_length(n + 1, shape) for n in range(150)]
    assert {published.bucket(length) for length in range(100, 4001)} == {500, 1000, 2000, 4000}
    assert all(published.bucket(length) >= length for length in range(100, 4001))
    assert dataclasses.replace(ROLLOUT, lengths=Ramp(3, 9, 0)).length(0) == 9
    # A rollout is 16 training steps long, not one.
    assert [published.number(step) for step in (0, 15, 16, 79, 80)] == [0, 0, 1, 4, 5]
    assert dataclasses.replace(published, passes=2).number(80) == 2
    slots = [dataclasses.replace(ROLLOUT, batches_at_once=number).num_slots(4) for number in (None, 1, 2, 9)]
    assert slots == [8, 4, 8, 12]  # of three batches


def make_batches(mesh=None, num_inputs=5, **settings):
    definition, params = tiny.make_model(tiny.LLAMA)
    mesh = mesh or MeshConfig(data=1, fsdp=1, tensor=1).make()
    rollout = dataclasses.replace(ROLLOUT, **settings)
    batches = OnPolicyBatches(mesh, definition, rollout, Prompts(), num_inputs=num_inputs, batch_size=4, seed=7)
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
        # Three batches at a time: 4 tokens in the first rollout and 5 in the second, to the nearest whole block.
        assert batch.target_mask.sum(axis=1).max() <= (3 if number < 3 else 6)
        assert batch.tokens.shape[1] == (5 + 5 if number < 3 else 5 + 9)
    assert len({batch.tokens[:, -5:].tobytes() for batch in taken}) == 6  # each row has draws of its own


def test_each_batch_of_a_rollout_is_taken_as_often_as_asked():
    batches, state = make_batches(passes=2)
    taken = take(batches, state, 7)
    for first, second in zip(taken[:3], taken[3:6], strict=True):
        jax.tree.map(np.testing.assert_array_equal, first, second)
    assert taken[6].tokens.tobytes() != taken[0].tokens.tobytes()


@pytest.mark.slow
def test_texts_are_the_datas_own_with_the_share_that_is_asked_for():
    """Always, never, and from always to never: a row's draw is below a falling share less and less often."""
    own, state = make_batches(data_share=Ramp(1, 1))
    source = Prompts()
    for number, batch in enumerate(take(own, state, 6)):
        given = next(source)
        assert (batch.written_at == -1).all() and batch.target_mask.any()
        for row in range(4):
            targets = given.tokens[row][given.target_mask[row]][: 3 if number < 3 else 6]
            assert batch.tokens[row][batch.target_mask[row]].tolist() == targets.tolist()
            inputs = given.tokens[row][given.input_mask[row]]
            assert batch.tokens[row][batch.input_mask[row]].tolist() == inputs.tolist()
    mixed, _ = make_batches(data_share=Ramp(1, 0, 4, "linear"))
    written, _ = make_batches()
    shares = []
    for batch, other in zip(take(mixed, state, 12), take(written, state, 12), strict=True):
        by_student = (batch.written_at >= 0).any(axis=1)
        shares.append(1 - by_student.mean())
        jax.tree.map(  # what the student writes does not depend on the other rows
            lambda x, y: np.testing.assert_array_equal(x[by_student], y[by_student]),  # noqa: B023
            batch,
            other,
        )
    by_rollout = np.reshape(shares, (4, 3)).mean(axis=1)  # 12 rows each, of shares 3/4, 1/2, 1/4 and 0
    assert by_rollout[3] == 0 < by_rollout[0] < 1
    assert by_rollout[0] > by_rollout[2]


@pytest.mark.slow
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


def long_texts(text, example):
    return example["worth"] * len(text)


def make_graded(**settings):
    """Batches of two prompts with two texts each, judged by their length times a number of the prompt's."""
    definition, params = tiny.make_model(tiny.LLAMA)
    rollout = dataclasses.replace(ROLLOUT, rewards=Rewards(long_texts, group_size=2, divide_by_std=False), **settings)
    seen = []

    class Pairs(Prompts):
        def __next__(self):
            return tiny.rows_of(super().__next__(), [0, 1])

    def examples(batch):
        return [{"worth": float(row.sum())} for row in batch.tokens]

    grader = Grader(rollout.rewards, examples, lambda tokens: "x" * len(tokens))
    mesh = MeshConfig(data=1, fsdp=1, tensor=1).make()

    class Seen:
        def write(self, step, folder, metrics):
            assert folder == "rollout"
            seen.append((step, metrics))

    batches = OnPolicyBatches(mesh, definition, rollout, Pairs(), 5, 4, 7, grader=grader, writer=Seen())
    return batches, state_of(params), seen


def test_groups_are_texts_of_the_same_prompt_with_draws_of_their_own():
    batches, state, seen = make_graded()
    taken = take(batches, state, 3)
    source, rewards, differ = Prompts(), [], []
    for batch in taken:
        given = next(source)
        worth = given.tokens[:2].sum(axis=1).repeat(2)  # the example is that of the prompt before it was written to
        inputs = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.input_mask, strict=True)]
        asked = [row[mask].tolist() for row, mask in zip(given.tokens, given.input_mask, strict=True)]
        assert inputs == [asked[0], asked[0], asked[1], asked[1]]
        assert batch.example_ids.tolist() == [0, 1, 2, 3]
        differ += [(batch.tokens[i] != batch.tokens[i + 1]).any() for i in (0, 2)]
        earned = (worth * np.asarray(text_of(batch, tiny.VOCABULARY)).sum(axis=1)).reshape(2, 2)
        np.testing.assert_allclose(batch.advantage, (earned - earned.mean(axis=1, keepdims=True)).ravel(), rtol=1e-6)
        rewards.append(earned)
    assert all(differ)
    # A batch is judged when it is taken, while the update before it may still be running.
    ((step, metrics),) = seen
    assert step == 3 and metrics["reward"] == pytest.approx(np.mean(rewards))
    assert metrics["best_reward"] == pytest.approx(np.max(rewards, axis=2).mean())


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_a_resumed_run_keeps_advantages_and_judges_nothing_again(ahead):
    batches, state, seen = make_graded(passes=2, ahead=ahead)
    take(batches, state, 4)
    resumed, _, seen_again = make_graded(passes=2, ahead=ahead)
    resumed.load_state_dict(batches.state_dict())
    for step in range(4, 10):
        found, expected = (x.next_batch(state.replace(step=jnp.int32(step))) for x in (resumed, batches))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert found.advantage.shape == (4,)
    # Those ahead are judged early, and because the run was saved.
    assert [step for step, _ in seen] == ([3, 4, 10] if ahead else [3, 9])
    assert [step for step, _ in seen_again] == [10 if ahead else 9]


@pytest.mark.slow
def test_texts_ahead_are_by_the_parameters_of_the_rollout_before():
    """The first two rollouts are by the first parameters, the third by those of the second rollout's start."""
    (ahead, state, _), (present, _, _) = make_graded(ahead=True), make_graded()
    other = jax.tree.map(lambda x: 2 * x, state.params)
    for step in range(9):
        found = ahead.next_batch(state_of(state.params if step < 3 else other, step))
        expected = present.next_batch(state_of(state.params if step < 6 else other, step))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


LEARNERS = {
    surrogate: (
        PolicyGradient(3, surrogate),
        BlockDecoder(3, MaskedDecoder(num_steps=3, order="random", temperature=1.0)),
    )
    for surrogate in ("trajectory", "one_step", "coupled")
} | {
    "bounds": (SandwichedPolicyGradient(3), BlockDecoder(3, MaskedDecoder(num_steps=3, temperature=1.0))),
    "autoregressive": (AutoregressivePolicyGradient(), AutoregressiveDecoder(temperature=1.0)),
    "masked": (MaskedPolicyGradient(), MaskedDecoder(num_steps=3, order="random", temperature=1.0)),
    "sundae": (SundaePolicyGradient(), SundaeDecoder(num_steps=2, num_samples=1, temperature=1.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_a_model_learns_to_write_what_is_rewarded(learner):
    """The reward is the share of even ids. Forty updates on twenty rollouts; the first and the last are compared."""
    mesh = MeshConfig(data=1, fsdp=1, tensor=1).make()
    definition, _ = tiny.make_model(dataclasses.replace(tiny.LLAMA, num_layers=1))
    objective, decoder = LEARNERS[learner]
    optimizer, rewards = optax.adam(2e-2), Rewards(lambda text, example: float(text), group_size=8)
    abstract, state = tiny.fresh_state(mesh, definition, optimizer)
    rollout = Rollout(decoder, num_batches=2, lengths=Ramp(6, 6), num_buckets=1, rewards=rewards)
    seen = []

    class Seen:
        def write(self, step, folder, metrics):
            seen.append(metrics["reward"])

    def even(tokens):
        return str(np.mean(np.array(tokens) % 2 == 0))

    grader = Grader(rewards, lambda batch: [{}] * len(batch.tokens), even)
    settings = {"prepare": objective.prepare_rollout, "grader": grader, "writer": Seen()}
    batches = OnPolicyBatches(mesh, definition, rollout, Prompts(), 5, 32, 0, **settings)
    step = make_train_step(mesh, abstract, definition, objective, optimizer, seed=0)
    for _ in range(40):
        state, metrics = step(state, put_batch(mesh, batches.next_batch(state)))
        assert not metrics["bad"]
    assert len(seen) == 20 and np.mean(seen[-3:]) > np.mean(seen[:3]) + 0.2, seen


class Data(OfTexts):
    """The part of a data set that `check_rollout` reads."""

    name, pack, batch_size, task_feature_lengths = "data", False, 4, {"inputs": 5, "targets": 9}

    def vocabulary(self):
        return ByteVocabulary()


class Tokens:
    """Data without texts, as `cache_tasks` writes them."""

    name, pack, batch_size, task_feature_lengths = Data.name, Data.pack, Data.batch_size, Data.task_feature_lengths


@pytest.mark.parametrize(
    ("objective", "rewards", "message"),
    [
        (PolicyGradient(3), None, "learns from rewards: set Rollout.rewards"),
        (Distillation(3), Rewards(long_texts, 2), "reads no rewards"),
        (PolicyGradient(3), Rewards(long_texts, 3), "does not divide into groups of 3"),
        (PolicyGradient(3), Rewards(long_texts, 2), "an order other than confidence"),
        (PolicyGradient(2), Rewards(long_texts, 2), "writes blocks of 3, but PolicyGradient has blocks of 2"),
        (PolicyGradient(3, blocks_from="row"), Rewards(long_texts, 2), 'has "row": set both'),
        (MaskedPolicyGradient(), Rewards(long_texts, 2), "without blocks objectives/masked_policy_gradient.gin"),
        (SundaePolicyGradient(), Rewards(long_texts, 2), "a SUNDAE model objectives/sundae_policy_gradient.gin"),
    ],
)
def test_objective_and_rewards_must_agree(objective, rewards, message):
    with pytest.raises(UserError, match=message):
        check_rollout(objective, tiny.LLAMA, dataclasses.replace(ROLLOUT, rewards=rewards), Data())
    whole = dataclasses.replace(ROLLOUT, decoder=MaskedDecoder(temperature=1.0), rewards=Rewards(long_texts, 2))
    with pytest.raises(UserError, match="guidance = 0, a SundaeDecoder"):
        check_rollout(MaskedPolicyGradient(), tiny.LLAMA, whole, Data())
    check_rollout(MaskedPolicyGradient("one_step"), tiny.ENCODER_DECODER, whole, Data())
    of_canvases = Rollout(SundaeDecoder(num_samples=1), lengths=ROLLOUT.lengths, rewards=Rewards(long_texts, 2))
    with pytest.raises(UserError, match="update_share = 1"):
        check_rollout(SundaePolicyGradient(), tiny.LLAMA, of_canvases, Data())
    apart = dataclasses.replace(tiny.LLAMA, architecture="encoder_decoder")
    with pytest.raises(UserError, match="is for decoder-only models"):
        check_rollout(PolicyGradient(3), apart, dataclasses.replace(ROLLOUT, rewards=Rewards(long_texts, 2)), Data())
    any_decoder = PolicyGradient(3, "one_step")
    with pytest.raises(UserError, match="has only tokens"):
        check_rollout(any_decoder, tiny.LLAMA, dataclasses.replace(ROLLOUT, rewards=Rewards(long_texts, 2)), Tokens())
    check_rollout(any_decoder, tiny.LLAMA, dataclasses.replace(ROLLOUT, rewards=Rewards(long_texts, 2)), Data())


@pytest.mark.slow
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
        ({"decoder": RemaskingDecoder()}, "a masked canvas, and what it wrote must stay"),
        ({"lengths": Ramp(11, 10)}, "must not get shorter"),
        ({"lengths": Ramp(0, 10)}, "at least 1"),
        ({"passes": 0}, "at least 1"),
        ({"batches_at_once": 0}, "at least 1"),
        ({"data_share": Ramp(0, 1.5)}, "data_share must lie in"),
        ({"num_buckets": 0}, "at least 1"),
        ({"ahead": True}, "hides the time of rewards"),
        ({"decoder": SundaeDecoder(num_samples=1)}, "counts slots"),
    ],
)
def test_mistakes(wrong, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ROLLOUT, **wrong)
