"""Splits the cases of a parametrised test: the quick suite runs a few of them, the slow suite the others."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """Returns cases for `pytest.mark.parametrize`: those that are not kept are slow ones, run with `-m slow`."""
    cases = list(cases)
    assert any(case in kept for case in cases)
    return [case if case in kept else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
