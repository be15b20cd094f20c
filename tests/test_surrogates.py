"""The figures on the policy gradient's surrogates: which of them are exact, and that fewer states vary more."""

import pathlib

import pytest

pytestmark = pytest.mark.slow  # six programs


@pytest.fixture
def surrogates(monkeypatch):
    """The module of launch/ under test."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "launch"))
    import surrogates

    return surrogates


def test_trajectories_have_no_bias_and_the_others_do(surrogates, monkeypatch):
    kept = [name for name in surrogates.SURROGATES if not name.startswith("bounds")]
    monkeypatch.setattr(surrogates, "SURROGATES", {name: surrogates.SURROGATES[name] for name in kept})
    every, two, one, all_masked, both, either = surrogates.measure(seed=0, num_draws=50)
    assert every.bias == 0 and two.bias < 0.3 and one.bias < 0.4
    assert every.deviation < two.deviation < one.deviation and both.deviation < either.deviation
    assert all_masked.bias > both.bias > 0.4 and all_masked.cosine < both.cosine < 0.99
