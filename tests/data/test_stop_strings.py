"""Stop strings against a reader that takes one character at a time, and of texts that arrive in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_t5x.data.stop_strings import check, trim
from diffusion_t5x.errors import UserError

TEXTS = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def read(text, stops):
    """One character at a time, until the text read so far ends in a stop string."""
    for end in range(1, len(text) + 1):
        if ends := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ends))], True
    return text, False


@given(text=TEXTS, stops=STOPS)
def test_a_text_ends_before_the_first_complete_stop_string(text, stops):
    trimmed = trim(text, stops)
    assert (trimmed.text, trimmed.stopped) == read(text, stops)


@given(text=TEXTS, stops=STOPS)
def test_what_is_shown_of_a_partial_text_is_never_taken_back(text, stops):
    whole, shown = trim(text, stops), ""
    for end in range(len(text) + 1):
        part = trim(text[:end], stops, partial=True)
        assert part.text.startswith(shown) and whole.text.startswith(part.text)
        # Nothing is held back that could be shown: some continuation ends the text just there.
        if not part.stopped and part.text != text[:end]:
            held = text[len(part.text) : end]
            assert any(stop.startswith(held) and stop != held for stop in stops)
        shown = part.text
        if part.stopped:
            assert part == whole
            return
    assert not whole.stopped


def test_examples():
    assert trim("yes\nUser: no", ["\nUser:", "\n\n"]).text == "yes"
    assert trim("yes\nUs", ["\nUser:"], partial=True).text == "yes"
    assert trim("yes\nUs", ["\nUser:"]).text == "yes\nUs"


@pytest.mark.parametrize("stops", ["END", ["a", ""], [1]])
def test_what_is_no_stop_string(stops):
    with pytest.raises(UserError, match="--stop takes texts of at least one character"):
        check(stops, "--stop")
