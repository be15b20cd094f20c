"""Formats metrics and decoders for tables and charts: bounds, digits, one spelling for equal settings."""

import ast
import math
import re
from collections.abc import Sequence

# Names of metrics with a natural range, as regular expressions; all others are open-ended.
_BOUNDS = {
    r"exact_match|em|f1|bleu|math_accuracy|pass@\d+": (0.0, 100.0),
    r"accuracy(_\d+)?|acceptance|teacher_agreement|distinct_\d+": (0.0, 1.0),
}
_DIGITS = 3


def bounds(metric: str) -> tuple[float, float] | None:
    """Returns the minimum and maximum possible value of a metric: 0 to 100 for percentages, 0 to 1 for shares."""
    return next((ends for pattern, ends in _BOUNDS.items() if re.fullmatch(pattern, metric)), None)


def unit(metric: str) -> str:
    """Returns the axis label of a metric."""
    return f"{metric} (%)" if bounds(metric) == (0, 100) else metric


def number(value: float) -> str:
    """Returns the value with three significant digits; whole numbers without decimals."""
    if isinstance(value, int) or abs(value) >= 1000 or not math.isfinite(value):
        return f"{value:,.0f}"
    if abs(value) < 1e-12:  # what rounding leaves of a zero
        return "0"
    return f"{value:#.{_DIGITS}g}".rstrip(".")


def score(metric: str, value: float, interval: tuple[float, float] | None = None) -> str:
    """Returns a metric's value and its interval in brackets, with equal decimals and within the metric's bounds."""
    ends = bounds(metric)
    if ends is None and interval is None:
        return number(value)
    values = [value, *(interval or ())]
    if ends is not None:
        values = [min(max(v, ends[0]), ends[1]) if math.isfinite(v) else v for v in values]
    decimals = _decimals([abs(v) for v in values if math.isfinite(v)]) if ends is None else 1 if ends[1] == 100 else 3
    first, *rest = (_fixed(v, decimals) for v in values)
    return f"{first} [{', '.join(rest)}]" if rest else first


def decoder(text: str) -> str:
    """Returns a decoder such as `SundaeDecoder(num_steps=5, num_samples=4)` with its fields sorted, at every depth.

    Equal settings get equal text; text of another form is unchanged.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and all(field.arg for field in node.keywords):
            node.keywords.sort(key=lambda field: field.arg or "")
    return ast.unparse(tree) if isinstance(tree.body, ast.Call) else text


def _decimals(values: Sequence[float]) -> int:
    """Returns the number of decimals that gives the largest of these numbers three digits."""
    largest = max(values, default=0.0)
    if largest < 1e-12:
        return 1
    return min(6, max(0, _DIGITS - 1 - math.floor(math.log10(largest))))


def _fixed(value: float, decimals: int) -> str:
    return f"{value if round(value, decimals) else 0.0:,.{decimals}f}" if math.isfinite(value) else f"{value}"
