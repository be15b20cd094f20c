"""pass@k: the probability that at least one of k samples is right, with its 95 % interval.

A program is right if it passes its tests, a text if it equals its target.
"""

import collections
import logging
from collections.abc import Sequence

import numpy as np

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.code import execution as code_execution
from diffusion_t5x.evaluation.code.execution import Limits, Tests
from diffusion_t5x.evaluation.metrics import bootstrap_interval, wilson_interval

logger = logging.getLogger(__name__)

FEW_PROBLEMS = 500  # below this, one problem more or less shows in the first decimal
_KS = (1, 10, 100)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the unbiased estimate from n samples of which c pass: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), section 2.1.

    Raises:
      ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} cannot be estimated from {c} of {n} samples.")
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def pass_at_k_with_interval(n: int, passed: Sequence[int], k: int) -> tuple[float, float, float]:
    """Returns the mean of `pass_at_k` over problems and its 95 % interval, all within [0, 1].

    The interval is a bootstrap over problems. If every problem's estimate is 0 or 1, it is Wilson's: a bootstrap of
    zeros alone would have no width.

    Args:
      n: number of samples per problem.
      passed: number of passing samples per problem.
      k: number of samples in pass@k.
    """
    estimates = np.array([pass_at_k(n, c, k) for c in passed])
    size = len(estimates)
    if np.isin(estimates, (0.0, 1.0)).all():
        low, high = wilson_interval(int(estimates.sum()), size)
    else:
        low, high = bootstrap_interval(estimates[:, None], lambda sums: float(sums[0]) / size)
    return float(estimates.mean()), low, high


def passed_tests(
    targets: Sequence[Tests],
    predictions: Sequence[str | Sequence[str]],
    limits: Limits = Limits(),
    workers: int | None = None,
    allow_unsafe: bool = False,
) -> dict[str, float]:
    """SeqIO metric function for programs: pass@k in percent for k = 1, 10, 100 and n, up to n samples.

    Args:
      targets: each problem's tests.
      predictions: for each problem a program, or n samples of one.
      limits, workers, allow_unsafe: see `code_execution.check`.

    Returns:
      "pass@1", "pass@1_low", "pass@1_high", ..., and the percentage of samples with each other verdict ("wrong",
      "error", ...).

    Raises:
      UserError: no problems, different numbers of samples per problem, or no safe way to run them here.
    """
    samples = [[prediction] if isinstance(prediction, str) else list(prediction) for prediction in predictions]
    if not targets or len(targets) != len(samples):
        raise UserError(f"There are {len(samples)} predictions for {len(targets)} problems.")
    n = len(samples[0])
    if not n or any(len(some) != n for some in samples):
        raise UserError("pass@k needs the same number of samples, at least one, for each problem.")
    size = len(targets)
    if size < FEW_PROBLEMS:
        logger.warning("%d problems: one problem is %.1f points. Look at the interval.", size, 100 / size)
    verdicts = code_execution.check(
        [program for some in samples for program in some],
        [tests for tests in targets for _ in range(n)],
        limits=limits,
        workers=workers,
        allow_unsafe=allow_unsafe,
    )
    passed = [sum(verdict.passed for verdict in verdicts[i : i + n]) for i in range(0, size * n, n)]
    scores: dict[str, float] = {}
    for k in sorted({k for k in _KS if k <= n} | {n}):
        scores |= _percentages(n, passed, k)
    counts = collections.Counter(verdict.status for verdict in verdicts if not verdict.passed)
    return scores | {status: 100 * count / len(verdicts) for status, count in sorted(counts.items())}


def _percentages(n: int, passed: Sequence[int], k: int) -> dict[str, float]:
    """Returns pass@k and its interval in percent; arguments as in `pass_at_k_with_interval`."""
    share, low, high = pass_at_k_with_interval(n, passed, k)
    return {f"pass@{k}": 100 * share, f"pass@{k}_low": 100 * low, f"pass@{k}_high": 100 * high}


def exact_match_at_k(targets: Sequence[str], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """SeqIO metric function: pass@k in percent for k = 1, 2, 4, ... up to n, of n samples that may equal their target.

    Args:
      targets: the texts to be written.
      predictions: n samples for each of them.

    Returns:
      "pass@1", "pass@1_low", "pass@1_high", ...; {} for one sample each, whose pass@1 is `metrics.exact_match`.
    """
    n = len(predictions[0])
    if n == 1:
        return {}
    passed = [sum(sample == target for sample in samples) for target, samples in zip(targets, predictions, strict=True)]
    scores: dict[str, float] = {}
    for k in (2**power for power in range(n.bit_length())):
        scores |= _percentages(n, passed, k)
    return scores


def _check_sandbox(allow_unsafe: bool = False, **_: object) -> None:
    code_execution.check_isolation(allow_unsafe)


vars(exact_match_at_k).update(takes_samples=True)
vars(passed_tests).update(takes_samples=True, check_here=_check_sandbox)  # see data.scoring
