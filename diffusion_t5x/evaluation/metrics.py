"""Metrics of decoded text, each with its 95 % interval.

A metric is a SeqIO metric function: `f(targets, predictions) -> {name: value}` over texts. A share of examples has
Wilson's interval; a score that is not a mean over examples has a bootstrap over examples. Both show how much the result
would vary between test sets of this size, not between training seeds.
"""

import functools
import logging
import math
import re
import signal
import statistics
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epy

from diffusion_t5x.errors import UserError

with epy.lazy_imports():  # takes a while, and mistakes are answered without it
    import sacrebleu

CONFIDENCE = 0.95
_BLEU_ORDER = 4


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions that equal their target, character by character, with Wilson's interval.

    Raises:
      UserError: no examples, or a different number of predictions.
    """
    _check(targets, predictions)
    correct = sum(target == prediction for target, prediction in zip(targets, predictions, strict=True))
    return _percentage("exact_match", correct, len(targets))


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns corpus BLEU as sacrebleu computes it (see `bleu_signature`), with a bootstrap interval over sentences.

    Raises:
      UserError: no examples, or a different number of predictions.
    """
    _check(targets, predictions)
    # Corpus BLEU is a function of counts summed over sentences. (`effective_order` changes no count; without it
    # sacrebleu warns about scores of single sentences.)
    scorer = sacrebleu.BLEU(effective_order=True)
    sentences = [scorer.sentence_score(p, [t]) for t, p in zip(targets, predictions, strict=True)]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in sentences])
    low, high = bootstrap_interval(counts, _bleu_of_counts)
    return {"bleu": _bleu_of_counts(counts.sum(axis=0)), "bleu_low": low, "bleu_high": high}


def bleu_signature() -> str:
    """Returns sacrebleu's signature; only scores with the same signature are comparable."""
    return str(sacrebleu.BLEU(references=[[""]]).get_signature())


def distinct_n(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the share of distinct n-grams of words in all predictions, n = 1, 2, 3 (arXiv 1510.03055).

    It depends on the amount of text: compare equal numbers of texts of equal length.
    """
    _check(targets, predictions)
    words = [prediction.split() for prediction in predictions]
    shares = {}
    for n in (1, 2, 3):
        ngrams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
        shares[f"distinct_{n}"] = len(set(ngrams)) / max(len(ngrams), 1)
    return shares


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Returns exact match and F1 of SQuAD v1.1 in percent, by t5's copy of the official script: texts are normalised.

    Args:
      targets: all answers to each question; the best match counts.
      predictions: one for each question.

    Raises:
      UserError: no examples, or a different number of predictions.
    """
    from t5.evaluation import metrics as t5_metrics

    _check(targets, predictions)
    scores = [t5_metrics.squad([t], [p]) for t, p in zip(targets, predictions, strict=True)]
    exact = sum(int(score["em"] == 100) for score in scores)
    f1 = np.array([score["f1"] for score in scores])
    f1_low, f1_high = bootstrap_interval(np.stack([f1, np.ones_like(f1)], 1), lambda sums: sums[0] / sums[1])
    return _percentage("em", exact, len(scores)) | {"f1": float(f1.mean()), "f1_low": f1_low, "f1_high": f1_high}


def math_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of solutions with the target's answer, compared by math-verify, with Wilson's interval.

    The answer of a text is the number right after the first "####" that has one, whatever follows: GSM8K's own rule.
    Otherwise it is what math-verify finds after the last "####" or in the whole text: the last \\boxed, formula or
    number. A text without an answer is wrong, and so is one that math-verify reads or compares for more than five
    seconds. That limit is an alarm: where the caller has set one, as rewards do, it is left to the caller, and outside
    the main thread there is none.

    Raises:
      UserError: no examples, a different number of predictions, a target without an answer, or no math-verify.
    """
    parse, verify = _math_verify()
    if threading.current_thread() is not threading.main_thread() or any(signal.getitimer(signal.ITIMER_REAL)):
        parse, verify = functools.partial(parse, parsing_timeout=None), functools.partial(verify, timeout_seconds=None)
    _check(targets, predictions)
    answers = [[parse(_answer_of(text)) for text in texts] for texts in (targets, predictions)]
    for target, answer in zip(targets, answers[0], strict=True):
        if not answer:
            raise UserError(f"The target {target[-80:]!r} has no answer that math-verify can read.")
    correct = sum(verify(target, prediction) for target, prediction in zip(*answers, strict=True))
    return _percentage("math_accuracy", correct, len(targets))


_GSM8K_ANSWER = re.compile(r"####\s*(-?\$?[0-9.,]*[0-9](?:/[0-9]+)?)")


def _answer_of(text: str) -> str:
    """Returns the part of a solution that has its answer."""
    number = _GSM8K_ANSWER.search(text)
    return number[1] if number else text.rpartition("####")[2]


def _math_verify() -> tuple[Callable[..., Any], Callable[..., bool]]:
    """Returns math-verify's `parse` and `verify`."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError("The metric math_accuracy needs math-verify: pip install diffusion_t5x[math]") from error
    for name in ("parser", "grader"):  # they warn of the missing alarm, too
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    return parse, verify


vars(math_accuracy)["check_here"] = _math_verify  # see data.scoring


def warn_of_small_difference(first: float, second: float, num_examples: int) -> str | None:
    """Returns a warning if two scores in percent differ by less than a single example could change.

    Args:
      first, second: scores of a metric that is a mean over examples.
      num_examples: number of scored examples.
    """
    worth, difference = 100 / num_examples, abs(first - second)
    if not 0 < difference < worth * (1 - 1e-9):
        return None
    return f"A difference of {difference:.2g} points is less than one of {num_examples} examples counts ({worth:.2g})."


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion (Wilson 1927): sound near 0 and 1 and for few trials. Within [0, 1]."""
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half_width = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - half_width) / scale, (centre + half_width) / scale
    return 0.0 if successes == 0 else low, 1.0 if successes == trials else high  # exactly, where rounding is not


def bootstrap_interval(
    counts: np.ndarray, score: Callable[[np.ndarray], float], num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Returns the 95 % percentile interval of a score under resampling of the examples.

    Args:
      counts: `[examples, k]`, each example's part of the score's sufficient statistics.
      score: computes the score from summed counts `[k]`.
      num_resamples: number of test sets of the same size to draw, with replacement.
      seed: seed of the draws.
    """
    size = len(counts)
    if size == 1:  # all resamples are equal
        return (score(counts[0]),) * 2
    rng = np.random.default_rng(seed)
    # How often each example is drawn, times what it adds.
    scores = [score(np.bincount(rng.integers(size, size=size), minlength=size) @ counts) for _ in range(num_resamples)]
    low, high = np.quantile(scores, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _bleu_of_counts(counts: np.ndarray) -> float:
    *ngrams, sys_len, ref_len = counts.tolist()
    correct, total = ngrams[:_BLEU_ORDER], ngrams[_BLEU_ORDER:]
    return sacrebleu.BLEU.compute_bleu(correct, total, sys_len, ref_len, smooth_method="exp").score


def _percentage(name: str, correct: int, total: int) -> dict[str, float]:
    """Returns a share of examples in percent, with Wilson's interval."""
    low, high = wilson_interval(correct, total)
    return {name: 100 * correct / total, f"{name}_low": 100 * low, f"{name}_high": 100 * high}


def _check(targets: Sequence[object], predictions: Sequence[object]) -> None:
    if not targets:
        raise UserError("There are no examples to score: the split is empty, or everything was filtered out.")
    if len(targets) != len(predictions):
        raise UserError(f"There are {len(predictions)} predictions for {len(targets)} targets.")
