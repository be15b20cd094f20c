"""Rewards, and the advantages of texts within their groups."""

import math
import threading
import time

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffusion_t5x.data.ends import text_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.training.rewards import Grader, LengthPenalty, Rewards, advantages, judged

EXAMPLE = {"inputs_pretokenized": "2 + 2", "targets_pretokenized": "4"}


def length(text, example):
    assert example is EXAMPLE
    return len(text)


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-3, 3, width=32)))
def test_advantages_are_standard_scores_in_their_group(rewards):
    centred, scaled = (advantages(rewards, divide) for divide in (False, True))
    np.testing.assert_allclose(centred, rewards - rewards.mean(axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(scaled.mean(axis=1), 0, atol=1e-5)
    for group, scores in zip(rewards, scaled, strict=True):
        if len(set(group.tolist())) == 1:
            assert (scores == 0).all()
        else:
            np.testing.assert_allclose(scores.std(), 1, atol=1e-4)


def test_groups_of_equal_rewards_have_exactly_none():
    """The mean of 0.1, in floating point, need not be 0.1."""
    assert (advantages(np.full((2, 7), 0.1, np.float32), True) == 0).all()
    np.testing.assert_allclose(advantages(np.array([[0, 0, 0, 4.0]]), True)[0, -1], math.sqrt(3), rtol=1e-6)


def test_a_reward_that_fails_is_data(caplog):
    def fragile(text, example):
        while text == "slow":
            try:
                time.sleep(0.001)
            except Exception:
                return 1.0  # as a library may go on after whatever stops it
        return {"good": 1.0, "nan": math.nan, "text": "x"}[text]

    texts = ["good", "missing", "slow", "nan", "text", "good"]
    start = time.monotonic()
    rewards, failed = judged(fragile, texts, [EXAMPLE] * 6, seconds=0.2)
    assert rewards.tolist() == [1, 0, 0, 0, 0, 1] and failed.tolist() == [False, True, True, True, True, False]
    assert time.monotonic() - start < 5
    assert [record.message for record in caplog.records] == ["the reward of 'missing' failed: KeyError: 'missing'"]


def test_an_error_of_the_user_ends_the_run():
    def wrong(text, example):
        raise UserError("no sandbox")

    with pytest.raises(UserError, match="no sandbox"):
        judged(wrong, ["x"], [EXAMPLE], 1)


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_an_empty_text_does_not_pay(text):
    rewards, failed = judged(lambda text, example: 5.0, [text, "x"], [EXAMPLE] * 2, 1)
    assert rewards.tolist() == [0, 5] and not failed.any()
    assert judged(lambda text, example: -5.0, [text], [EXAMPLE], 1)[0] == -5


def test_rewards_are_judged_in_other_threads_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(judged(length, ["four"], [EXAMPLE], 0.1)[0].tolist()))
    thread.start()
    thread.join()
    assert found == [[4]]


EOS, PAD = tiny.VOCABULARY.eos_id, tiny.VOCABULARY.pad_id
WRITTEN = [[5, 6, 7, 8], [5, 6, EOS, 9], [PAD, 5, 6, 7], [EOS, PAD, PAD, PAD]]


def graded(**settings):
    """Four texts in groups of two, whose reward is the number of their tokens, without the end."""
    batch = tiny.one_a_row([([3, 4], text) for text in WRITTEN], length=8)
    rewards = Rewards(lambda text, example: len(text.split()), group_size=2, divide_by_std=False, **settings)

    def to_text(tokens):
        return " ".join(str(token) for token in tokens if token not in (EOS, PAD))

    in_text = np.asarray(text_of(batch, tiny.VOCABULARY))
    return Grader(rewards, None, to_text).grade(batch, in_text, dict.fromkeys(range(4), EXAMPLE))


def test_a_rollout_is_graded_up_to_the_ends_of_its_texts():
    """Tokens after an end, and padding, are neither judged nor counted: filling the canvas earns nothing."""
    texts, metrics = graded()
    np.testing.assert_allclose(texts.advantage, [1, -1, 0, 0])
    assert metrics.pop("reward_seconds") < 5
    assert metrics == {
        "reward": 1.5,
        "best_reward": 2,
        "groups_without_spread": 0.5,
        "reward_failures": 0,
        "text_length": (4 + 3 + 1 + 1) / 4,
    }


def test_length_is_paid_for_and_emptiness_too():
    """Equation 13 of DAPO: nothing up to `start`, all of it from `end` on, linear in between."""
    penalty = LengthPenalty(2, 4, weight=3.0)
    lengths = np.array([1, 2, 3, 4, 9, 1])
    found = penalty.of(lengths, np.arange(6) == 5)
    np.testing.assert_allclose(found, [0, 0, 1.5, 3, 3, 3])
    texts, metrics = graded(length_penalty=penalty)
    # 4 tokens of reward 4, 3 of reward 2; two empty texts.
    np.testing.assert_allclose(texts.advantage, [(1 - 0.5) / 2, (0.5 - 1) / 2, 0, 0])
    assert metrics["reward"] == 1.5 and metrics["length_penalty"] == (3 + 1.5 + 3 + 3) / 4
    for wrong in ((-1, 3), (3, 3)):
        with pytest.raises(UserError, match="start < end"):
            LengthPenalty(*wrong)


def test_mistakes():
    with pytest.raises(UserError, match="group_size"):
        Rewards(length, group_size=1)
    with pytest.raises(UserError, match="seconds"):
        Rewards(length, seconds=0)
