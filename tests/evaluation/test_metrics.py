"""Metrics of text against sacrebleu's own scores and the published formulas of the intervals."""

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


@pytest.mark.parametrize("metric", [metrics.bleu, metrics.exact_match])
def test_nothing_to_score(metric):
    with pytest.raises(UserError, match="no examples"):
        metric([], [])
    with pytest.raises(UserError, match="1 predictions for 2 targets"):
        metric(["a", "b"], ["a"])
