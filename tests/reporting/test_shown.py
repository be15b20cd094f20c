"""A report: the form of scores, decoders and canvases."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_t5x.reporting import shown
from diffusion_t5x.reporting.published import Published
from diffusion_t5x.reporting.report import canvases, changes, score_table
from diffusion_t5x.reporting.runs import Scores

PAPER = Published("arXiv 1|2, table 3", "a method", "Base", "", "", {}, {})


def test_the_papers_numbers_follow_ours():
    ours = Scores("squad", "m", 3, "", 2, {"f1": 50.0, "em": 40.0}, [(PAPER, "f1", 77.41)])
    same = Scores("squad", "n", 4, "", 2, {"f1": 51.0}, [(PAPER, "f1", 77.41)])
    table = score_table("squad", [("a", ours), ("b", same)])
    assert table["papers"] == [("arXiv 1|2, table 3", "Base, a method", ["77.4", None])]


@settings(deadline=None)
@given(st.text("ab·", max_size=12), st.text("ab·", max_size=12))
def test_changed_characters_are_marked_and_the_others_were_there(before, after):
    pieces = changes(before, after)
    assert "".join(piece for piece, _ in pieces) == after
    kept = iter(before)
    assert all(character in kept for piece, is_new in pieces if not is_new for character in piece)
    assert (before == after) == (not any(is_new for _, is_new in pieces)) or len(after) < len(before)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["ab", "abc", "xbc"]), min_size=1, max_size=8))
def test_canvases_cover_every_step_once(trace):
    rows = canvases(trace)
    steps = [step for label, _ in rows for step in range(int(label.split("–")[0]), int(label.split("–")[-1]) + 1)]
    assert steps == list(range(len(trace)))
    for label, pieces in rows:
        assert {trace[int(step)] for step in label.split("–")} == {"".join(piece for piece, _ in pieces)}


@pytest.mark.parametrize(
    ("metric", "value", "interval", "expected"),
    [
        ("bleu", 0.0, (3.31e-16, 4.2), "0.0 [0.0, 4.2]"),
        ("bleu", 3.31e-16, (-1e-14, 3.31e-16), "0.0 [0.0, 0.0]"),
        ("exact_match", 100.0, (43.85, 100.00000000000001), "100.0 [43.9, 100.0]"),
        ("exact_match", 6.25, (1.7, 20.1), "6.2 [1.7, 20.1]"),
        ("accuracy", 0.0, (-0.05, 1.2), "0.000 [0.000, 1.000]"),
        ("f1", 5.0, None, "5.0"),
        ("bits_per_byte", 1.5, (1.25, 1.75), "1.50 [1.25, 1.75]"),
        ("nll", -0.0, (-1e-18, 0.25), "0.000 [0.000, 0.250]"),
        ("nll", 123.4, (99.5, 150.0), "123 [100, 150]"),
        ("my_score", 1e-15, None, "0"),
        ("my_score", 0.00012345, None, "0.000123"),
        ("exact_match", float("nan"), (0.0, 1.0), "nan [0.0, 1.0]"),
    ],
)
def test_an_interval_has_the_decimals_of_its_value_and_stays_within_bounds(metric, value, interval, expected):
    assert shown.score(metric, value, interval) == expected


@pytest.mark.parametrize("text", ["", "not ( a decoder", "D(1, *a, **b)", "x + 1", "<script>"])
def test_what_is_no_decoder_stays_as_it_is(text):
    assert shown.decoder(text) == text
