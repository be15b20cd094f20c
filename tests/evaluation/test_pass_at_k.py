"""pass@k against counting all subsets, its interval, and the metric on programs that really run."""

import itertools
import logging

import numpy as np
import pytest

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import metrics
from diffusion_t5x.evaluation.code.execution import Limits, Tests
from diffusion_t5x.evaluation.code.pass_at_k import (
    exact_match_at_k,
    pass_at_k,
    pass_at_k_with_interval,
    passed_tests,
)

RIGHT, WRONG, BROKEN = "def f(x): return x", "def f(x): return 1", "def f(x:"
TESTS = Tests(("assert f(1) == 1", "assert f(2) == 2"))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_it_is_the_share_of_subsets_with_a_pass(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]), abs=1e-12)


def test_it_stays_exact_where_binomials_overflow():
    # (1 - c/n) (1 - c/(n-1)) ... over k draws.
    assert pass_at_k(10_000, 3, 100) == pytest.approx(
        1 - np.prod([1 - 3 / (10_000 - i) for i in range(100)]), abs=1e-12
    )


def test_it_is_unbiased():
    """The mean over draws of n samples is 1 - (1 - p)^k; 20,000 draws leave less than 0.004 of noise."""
    passed = np.random.default_rng(0).binomial(20, 0.1, 20_000)
    found = np.mean([pass_at_k(20, c, 5) for c in passed])
    assert found == pytest.approx(1 - 0.9**5, abs=0.008)


@pytest.mark.parametrize("n,c,k", [(5, 1, 6), (5, 6, 1), (5, 1, 0), (5, -1, 1)])
def test_what_cannot_be_estimated(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from {c} of {n}"):
        pass_at_k(n, c, k)


def test_intervals():
    share, low, high = pass_at_k_with_interval(1, [1] * 9 + [0] * 81, 1)
    assert (share, low, high) == pytest.approx((0.1, *metrics.wilson_interval(9, 90)))
    _, low, high = pass_at_k_with_interval(80, [0] * 90, 10)  # nothing passed: not certain to be nothing
    assert low == pytest.approx(0, abs=1e-12) and high > 0.03
    passed = np.random.default_rng(0).integers(0, 11, 400)
    share, low, high = pass_at_k_with_interval(10, passed, 1)
    half_width = 1.96 * (passed / 10).std() / 20
    assert share == pytest.approx(passed.mean() / 10)
    assert (low, high) == pytest.approx((share - half_width, share + half_width), abs=half_width / 5)


@pytest.mark.usefixtures("isolation")
def test_the_metric_runs_programs(caplog):
    with caplog.at_level(logging.WARNING):
        scores = passed_tests([TESTS] * 4, [RIGHT, WRONG, BROKEN, WRONG])
    low, high = metrics.wilson_interval(1, 4)
    assert scores == pytest.approx(
        {"pass@1": 25, "pass@1_low": 100 * low, "pass@1_high": 100 * high, "error": 25, "wrong": 50}
    )
    assert "4 problems: one problem is 25.0 points" in caplog.text


@pytest.mark.usefixtures("isolation")
def test_the_metric_takes_samples():
    scores = passed_tests([TESTS] * 2, [[RIGHT, WRONG], [BROKEN, BROKEN]], limits=Limits(cpu_seconds=2))
    assert (scores["pass@1"], scores["pass@2"], scores["wrong"], scores["error"]) == (25, 50, 25, 50)
    assert all(type(value) is float for value in scores.values())


def test_mistakes():
    with pytest.raises(UserError, match="0 predictions for 0 problems"):
        passed_tests([], [])
    with pytest.raises(UserError, match="1 predictions for 2 problems"):
        passed_tests([TESTS] * 2, [RIGHT])
    with pytest.raises(UserError, match="same number of samples"):
        passed_tests([TESTS] * 2, [[RIGHT, WRONG], [RIGHT]])


def test_texts_are_right_if_they_equal_their_target():
    """Two, one and none of four samples are right: pass@2 is 1 - (2/4 * 1/3), 1 - (3/4 * 2/3) and 0."""
    samples = [["a", "b", "a", "c"], ["d", "x", "y", "z"], ["a", "a", "a", "a"]]
    scores = exact_match_at_k(["a", "d", "b"], samples)
    assert [name for name in scores if not name.endswith(("_low", "_high"))] == ["pass@1", "pass@2", "pass@4"]
    assert scores["pass@1"] == pytest.approx(100 * (0.5 + 0.25) / 3)
    assert scores["pass@2"] == pytest.approx(100 * (5 / 6 + 0.5) / 3)
    assert scores["pass@4"] == pytest.approx(100 * 2 / 3)
    assert exact_match_at_k(["a"], [["a"]]) == {}
