"""The examples behind rows of training data."""

import pytest
import tiny

from diffusion_t5x.data.examples import Examples
from diffusion_t5x.errors import UserError


class Texts:
    """Two batches of two and one example; the last is filled up."""

    name = "texts"

    def __init__(self, rows):
        self.rows = rows

    def eval_batches(self):
        for first in (0, 2):
            rows = self.rows[first : first + 2]
            examples = [(inputs, targets) for inputs, targets, _ in rows] + [([], [])] * (2 - len(rows))
            described = [
                {"example_id": first + i, "inputs_pretokenized": str(inputs), "tests": field}
                for i, (inputs, _, field) in enumerate(rows)
            ]
            yield tiny.one_a_row(examples, length=6), described


ROWS = [([3, 4], [5], "a"), ([3], [4, 5], "b"), ([3, 4], [6], "c")]


def test_a_row_has_the_example_with_its_inputs_and_targets():
    """Inputs and targets that are the same tokens in a row are told apart, wherever the row ends."""
    found = Examples(Texts(ROWS)).of(tiny.one_a_row([ROWS[1][:2], ROWS[2][:2], ROWS[0][:2]], length=9))
    assert [example["tests"] for example in found] == ["b", "c", "a"]


def test_an_example_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="must not draw at random"):
        Examples(Texts(ROWS)).of(tiny.one_a_row([([3, 4], [7])], length=6))


def test_examples_that_only_their_fields_tell_apart_are_refused():
    Examples(Texts([*ROWS[:2], ROWS[0]]))  # twice the same
    with pytest.raises(UserError, match="equal tokens and different fields"):
        Examples(Texts([*ROWS[:2], ([3, 4], [5], "other")]))
