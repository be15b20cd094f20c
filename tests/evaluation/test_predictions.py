"""Predictions made elsewhere find their examples, and every line that does not fit is named."""

import json

import pytest

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.predictions import add_predictions, read_predictions

EXAMPLES = [{"example_id": n, "targets_pretokenized": str(n)} for n in range(3)]


def added(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return add_predictions(EXAMPLES, read_predictions(str(path)), str(path), "split test of digits")


def test_lines_come_in_the_split_s_order_or_by_id(tmp_path):
    path = tmp_path / "made.jsonl"
    in_order = added(path, {"prediction": "a"}, {"predictions": ["b", "c"]}, {"prediction": "é"})
    assert in_order == [
        EXAMPLES[0] | {"prediction": "a"},
        EXAMPLES[1] | {"prediction": "b", "predictions": ["b", "c"]},
        EXAMPLES[2] | {"prediction": "é"},
    ]
    shuffled = [{"example_id": n, "prediction": f"p{n}", "inputs": "ours stay"} for n in (2, 0, 1)]
    assert added(path, *shuffled) == [EXAMPLES[n] | {"prediction": f"p{n}"} for n in range(3)]


ONE = {"prediction": "x"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((ONE, '{"prediction": "x\n', ONE), r"made.jsonl:2: not JSON"),
        ((ONE, ONE, "\n"), r"made.jsonl:3: not JSON"),
        ((ONE, '["x"]\n', ONE), r"made.jsonl:2: no prediction; a line is"),
        ((ONE, {"text": "x"}, ONE), r"made.jsonl:2: no prediction"),
        (({"prediction": 1}, ONE, ONE), r"made.jsonl:1: predictions must be text"),
        ((ONE, ONE, {"predictions": []}), r"made.jsonl:3: predictions must be text"),
        ((ONE, ONE), r"made.jsonl:2: ends without a line for example 2; split test of digits has 3 .*EXAMPLES=2"),
        ((), r"made.jsonl:0: ends without a line for example 0"),
        ((ONE, ONE, ONE, ONE), r"made.jsonl:4: no example 3 in split test of digits, which has 3"),
        ((ONE, ONE | {"example_id": 1}, ONE), r'made.jsonl:1: this line has no "example_id", but line 2 has'),
        ([ONE | {"example_id": n} for n in (0, 2, 0)], r"made.jsonl:3: example 0 again; line 1 has it"),
        ([ONE | {"example_id": n} for n in (0, 2, 7)], r"made.jsonl:3: no example 7 in"),
        ([ONE | {"example_id": n} for n in (0, 2)], r"made.jsonl:2: ends without a line for example 1"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, lines, expected):
    with pytest.raises(UserError, match=expected):
        added(tmp_path / "made.jsonl", *lines)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"Cannot read /no/such\.jsonl: No such file"):
        read_predictions("/no/such.jsonl")
