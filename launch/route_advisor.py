"""Advice on the route to take, for a training budget and a wanted speed of decoding: read off measured results."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from intervals import differences, interval, shown


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A route with one decoding setting.

    Attributes:
      route, decoder: their names.
      cost: of training, in TFLOP.
      tokens_per_pass: mean over seeds.
      values: the quality by seed.
    """

    route: str
    decoder: str
    cost: float
    tokens_per_pass: float
    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())


@dataclasses.dataclass(frozen=True)
class Advice:
    """The route with the best mean, and the best decoding of each route that cannot be distinguished from it."""

    best: Candidate
    alike: Sequence[Candidate]


def advise(
    candidates: Sequence[Candidate], budget: float, tokens_per_pass: float, *, lower_is_better: bool
) -> Advice | None:
    """Returns the best route within the budget that is at least that fast; None if there is none.

    A route is distinguished if the 95 % interval of its differences from the best, paired by seed, excludes 0. That
    takes at least two common seeds. Intervals are not corrected for the number of routes: one of 20 may miss.

    Args:
      candidates: everything measured.
      budget: the most that training may cost, in TFLOP.
      tokens_per_pass: the least number of tokens per pass in decoding.
      lower_is_better: True if a lower quality value is better.
    """
    sign = 1 if lower_is_better else -1
    fit = [x for x in candidates if x.cost <= budget and x.tokens_per_pass >= tokens_per_pass]
    by_route: dict[str, Candidate] = {}
    for candidate in sorted(fit, key=lambda x: sign * x.mean):
        by_route.setdefault(candidate.route, candidate)
    if not by_route:
        return None
    best, *others = by_route.values()
    return Advice(best, [other for other in others if not _distinguished(best, other)])


def _distinguished(first: Candidate, second: Candidate) -> bool:
    found = differences(first.values, second.values)
    if len(found) < 2:
        return False
    _, low, high = interval(found)
    return not low <= 0 <= high


def table(
    candidates: Sequence[Candidate],
    *,
    lower_is_better: bool,
    budget: float | None = None,
    tokens_per_pass: float | None = None,
) -> str:
    """Returns the advice as a table in Markdown: for each speed, the budgets from which another route is the best.

    If a budget or a speed is given, only for that one.
    """
    budgets = [budget] if budget is not None else sorted({x.cost for x in candidates})
    speeds = [tokens_per_pass] if tokens_per_pass is not None else _speeds(candidates)
    head = ["tokens per pass, at least", "TFLOP, at most", "route", "decoding", "quality", "not distinguishable"]
    rows = []
    for speed in speeds:
        before: object = None
        for most in budgets:
            found = advise(candidates, most, speed, lower_is_better=lower_is_better)
            best = found and (found.best.route, found.best.decoder)
            if best != before or not rows or rows[-1][0] != f"{speed:.3g}":
                cells = _cells(found) if found else ["none", "", "", ""]
                rows.append([f"{speed:.3g}", f"{math.ceil(most * 1e3) / 1e3:g}", *cells])
            before = best
    lines = [" | ".join(head), " | ".join(["---:"] * 2 + ["---"] * 4), *map(" | ".join, rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _speeds(candidates: Sequence[Candidate]) -> list[float]:
    """Returns speeds that all routes reach with some decoding setting, down to tenths of a token per pass."""
    slowest: dict[str, float] = {}
    for x in candidates:
        slowest[x.decoder] = min(x.tokens_per_pass, slowest.get(x.decoder, math.inf))
    return sorted({math.floor(speed * 10 + 1e-6) / 10 for speed in slowest.values()})


def _cells(advice: Advice) -> list[str]:
    best = advice.best
    alike = "; ".join(f"{x.route} ({shown(list(x.values.values()))})" for x in advice.alike)
    return [best.route, best.decoder, shown(list(best.values.values())), alike or "none"]
