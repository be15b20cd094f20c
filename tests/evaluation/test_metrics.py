"""Metrics of text against sacrebleu's own scores and the published formulas of the intervals."""

import collections
import json
import re
import string
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import metrics

TARGETS = ["The cat sat on the mat.", "le 3 janvier 2024 à 12 h 05", "un deux trois quatre cinq", "", "12,5 %", "oui"]
PREDICTIONS = ["The cat sat on a mat.", "le 3 janvier 2024 à 12 h 05", "un deux trois cinq", "x", "12,5 %", ""]


def texts(size, seed):
    rng = np.random.default_rng(seed)
    targets = [" ".join(rng.choice(list("abcdefgh"), size=rng.integers(5, 20))) for _ in range(size)]
    predictions = [" ".join(w if rng.random() < 0.8 else "z" for w in target.split()) for target in targets]
    return targets, predictions


@pytest.mark.parametrize(
    "targets,predictions", [(TARGETS, PREDICTIONS), texts(200, 0), (["a"], ["b"]), (["a b"], [""])]
)
def test_bleu_is_sacrebleus(targets, predictions):
    result = metrics.bleu(targets, predictions)
    assert result["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [targets]).score, rel=1e-12)
    assert result["bleu_low"] <= result["bleu"] <= result["bleu_high"]
    assert all(type(value) is float for value in result.values())


def test_bleu_interval_agrees_with_sacrebleus_bootstrap():
    targets, predictions = texts(300, 1)
    result = metrics.bleu(targets, predictions)
    assert result == metrics.bleu(targets, predictions)
    # sacrebleu's interval is mean ± half width, from its own draws; 1,000 of them leave about 4 % noise in either.
    reference = sacrebleu.BLEU().corpus_score(predictions, [targets], n_bootstrap=1000)
    assert (result["bleu_high"] - result["bleu_low"]) / 2 == pytest.approx(reference._ci, rel=0.15)
    assert (result["bleu_high"] + result["bleu_low"]) / 2 == pytest.approx(reference._mean, abs=reference._ci / 10)


def test_bleu_of_equal_texts_is_100():
    targets, _ = texts(20, 2)
    assert metrics.bleu(targets, targets) == pytest.approx({"bleu": 100, "bleu_low": 100, "bleu_high": 100})


def test_bleu_signature():
    reference = sacrebleu.BLEU()
    reference.corpus_score(PREDICTIONS, [TARGETS])
    assert metrics.bleu_signature() == str(reference.get_signature())


@pytest.mark.parametrize(
    "successes,trials,low,high",
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_published_values(successes, trials, low, high):
    assert metrics.wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = metrics.wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_ends_at_0_and_1_exactly():
    for trials in range(1, 100):
        assert metrics.wilson_interval(0, trials)[0] == 0 and metrics.wilson_interval(trials, trials)[1] == 1
        for successes in range(1, trials):
            low, high = metrics.wilson_interval(successes, trials)
            assert 0 < low < successes / trials < high < 1


def test_exact_match_counts_equal_strings():
    result = metrics.exact_match(TARGETS, PREDICTIONS)
    low, high = metrics.wilson_interval(2, 6)
    expected = {"exact_match": 100 / 3, "exact_match_low": 100 * low, "exact_match_high": 100 * high}
    assert result == pytest.approx(expected)
    assert all(type(value) is float for value in result.values())
    assert metrics.exact_match(["a"], ["A"])["exact_match"] == 0
    assert metrics.exact_match(["a"], ["a "])["exact_match"] == 0


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    low, high = metrics.bootstrap_interval(
        np.stack([values, np.ones_like(values)], axis=1), lambda sums: sums[0] / sums[1], num_resamples=4000
    )
    half_width = 1.959964 * values.std() / 2000**0.5
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=half_width / 10)


@pytest.mark.parametrize("metric", [metrics.bleu, metrics.exact_match, metrics.squad])
def test_nothing_to_score(metric):
    with pytest.raises(UserError, match="no examples"):
        metric([], [])
    with pytest.raises(UserError, match="1 predictions for 2 targets"):
        metric(["a", "b"], ["a"])


def test_bleu_is_that_of_sacrebleus_own_command(tmp_path):
    targets, predictions = texts(50, 3)
    for name, lines in (("targets", targets), ("predictions", predictions)):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "targets", "-i", "predictions", "-w", "10"]
    printed = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout)
    assert metrics.bleu(targets, predictions)["bleu"] == pytest.approx(printed["score"], abs=1e-9)
    assert metrics.bleu_signature() == printed["signature"]


def squad_evaluate(answers, predictions):
    """rajpurkar/SQuAD-explorer, evaluate-v1.1.py, written down anew: exact match and F1 in percent."""

    def normalize(text):
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(prediction, answer):
        common = sum((collections.Counter(prediction) & collections.Counter(answer)).values())
        if not common:
            return 0.0
        precision, recall = common / len(prediction), common / len(answer)
        return 2 * precision * recall / (precision + recall)

    normalized = [(normalize(p), [normalize(a) for a in every]) for p, every in zip(predictions, answers, strict=True)]
    em = [any(p == a for a in every) for p, every in normalized]
    return 100 * np.mean(em), 100 * np.mean([max(f1(p, a) for a in every) for p, every in normalized])


SQUAD_CASES = [  # answers, prediction, exact, F1
    (["Denver Broncos", "The Denver Broncos"], "the denver broncos!", 100, 100),
    (["gold"], "a golden anniversary", 0, 0),
    (["the 1,000 men"], "1000 men", 100, 100),
    (["Santa Clara, California", "Levi's Stadium"], "in Santa Clara", 0, 200 * (2 / 3) * (2 / 3) / (4 / 3)),
    (["an apple  a day"], "apple day", 100, 100),
    (["theory"], "the theory", 100, 100),
    (["U.S."], "us", 100, 100),
    (["308"], "", 0, 0),
]


def test_squad_is_the_official_script_s():
    answers, predictions = [list(x) for x in zip(*((case[0], case[1]) for case in SQUAD_CASES), strict=True)]
    for every, prediction, em, f1 in SQUAD_CASES:
        result = metrics.squad([every], [prediction])
        assert (result["em"], result["f1"]) == pytest.approx((em, f1), abs=1e-9)
    result = metrics.squad(answers, predictions)
    assert (result["em"], result["f1"]) == pytest.approx(squad_evaluate(answers, predictions), abs=1e-9)
    low, high = metrics.wilson_interval(5, 8)
    assert (result["em_low"], result["em_high"]) == pytest.approx((100 * low, 100 * high))
    assert result["f1_low"] < result["f1"] < result["f1_high"]
    assert all(type(value) is float for value in result.values())


@pytest.mark.slow
def test_squad_f1_interval_is_the_normal_one():
    rng = np.random.default_rng(0)
    answers = [["a1 b2 c3 d4"]] * 400
    predictions = [" ".join(["a1", "b2", "c3", "d4"][: rng.integers(1, 5)]) for _ in answers]
    result = metrics.squad(answers, predictions)
    f1 = [metrics.squad([a], [p])["f1"] for a, p in zip(answers, predictions, strict=True)]
    half_width = 1.959964 * np.std(f1) / 400**0.5
    assert (result["f1_high"] - result["f1_low"]) / 2 == pytest.approx(half_width, rel=0.15)


def test_math_answers_are_compared_as_mathematics():
    pytest.importorskip("math_verify")
    cases = {
        ("So 5 + 3 = 8 apples.\n#### 8", "#### 8"): 1,
        ("#### 1,000", "He has 12 and so on. #### 1000"): 1,
        ("#### 8", "#### 9"): 0,
        ("#### 72", "... \n#### 72\n\nQuestion: Tom has 5 apples and 3 more. #### 8"): 1,
        ("#### 72", "... \n#### 72 clips in 2 months"): 1,
        ("#### 72", "the answer is 72."): 1,
        ("#### 8", "no idea"): 0,
        (r"Thus $\boxed{\frac{1}{2}}$", r"It is $\boxed{0.5}$"): 1,
        (r"$\boxed{x^2+2x+1}$", r"$\boxed{(x+1)^2}$"): 1,
        (r"$\boxed{3}$", r"$\boxed{-3}$"): 0,
    }
    for (target, prediction), right in cases.items():
        assert metrics.math_accuracy([target], [prediction])["math_accuracy"] == 100 * right, (target, prediction)
    result = metrics.math_accuracy(*map(list, zip(*cases, strict=True)))
    low, high = metrics.wilson_interval(7, 10)
    expected = {"math_accuracy": 70, "math_accuracy_low": 100 * low, "math_accuracy_high": 100 * high}
    assert result == pytest.approx(expected)
    with pytest.raises(UserError, match="has no answer"):
        metrics.math_accuracy(["none at all"], ["1"])


@pytest.mark.parametrize(
    "first,second,num_examples,warned",
    [(50.0, 50.4, 90, True), (50.0, 52.0, 90, False), (50.0, 50.0, 90, False), (10.0, 10 + 100 / 90, 90, False)],
)
def test_a_difference_smaller_than_one_example_is_told(first, second, num_examples, warned):
    told = metrics.warn_of_small_difference(first, second, num_examples)
    assert (told is not None) == warned
    if warned:
        assert told == "A difference of 0.4 points is less than one of 90 examples counts (1.1)."
