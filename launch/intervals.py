"""95 % intervals over seeds, by Student's t."""

import statistics
from collections.abc import Mapping, Sequence

from scipy import stats


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean and the ends of its 95 % interval by Student's t; for a single value, both are the mean."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, mean, mean
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Returns first - second for each seed that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Returns "mean ± half-width of the 95 % interval", or the value if there is just one."""
    mean, low, _ = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {mean - low:.{digits}f}" if len(values) > 1 else "")
