"""The lines that show an evaluation while training runs."""

import rich.cells

from diffusion_t5x.evaluation.screen import evaluation_block, next_commands, with_intervals

SCORES = [
    ("dates", {"exact_match": 12.5, "exact_match_low": 3.498, "exact_match_high": 36.02, "decode_seconds": 1.5}),
    ("dates", {"loss": 2.345678, "nll": 1.25}),
    ("units", {"loss": 1.0}),
]
SAMPLES = {
    "dates": [
        {"inputs_pretokenized": "May 23", "prediction": "le 23\nmai", "targets_pretokenized": "23 mai", "score": 1.0},
        {"prediction": "\x1b[2J" + "漢" * 200, "targets_pretokenized": "\x9b" + "x" * 200},
    ]
}


def test_scores_by_data_set_then_samples():
    assert evaluation_block("evaluation at step 8", SCORES, {"dates": SAMPLES["dates"][:1]}, 80).splitlines() == [
        "evaluation at step 8",
        "  dates",
        "    exact_match 12.5 [3.498, 36.02]  decode_seconds 1.5  loss 2.346  nll 1.25",
        "    input   May 23",
        "    output  le 23␊mai",
        "    target  23 mai",
        "  units",
        "    loss 1",
    ]


def test_lines_fit_and_a_terminal_obeys_none_of_them():
    for width in (40, 80, 120):
        text = evaluation_block("evaluation", SCORES, SAMPLES, width)
        assert max(map(rich.cells.cell_len, text.splitlines())) <= width
        assert text.count("…") == 2 and "␛[2J漢" in text and "<U+009B>x" in text
        assert "exact_match 12.5 [3.498, 36.02]" in text  # never cut in two


def test_without_a_terminal_lines_are_those_of_a_log(capsys):
    text = evaluation_block("evaluation", SCORES, SAMPLES)
    assert 115 < max(map(rich.cells.cell_len, text.splitlines())) <= 120


def test_only_metrics_with_both_bounds_have_an_interval():
    metrics = {"loss": 1.0, "loss_low": 2.0, "bleu_high": 3.0, "bleu": 2.0, "bleu_low": 1.0}
    assert with_intervals(metrics) == ["bleu 2 [1, 3]", "loss 1", "loss_low 2"]


def test_the_next_commands_are_those_that_work():
    assert next_commands("/tmp/a model", writes=True, scored=True).splitlines() == [
        "trained: /tmp/a model",
        "next:",
        "  diffusion-t5x generate --checkpoint '/tmp/a model'",
        "  diffusion-t5x eval --checkpoint '/tmp/a model'",
    ]
    assert "eval" not in next_commands("model", writes=True, scored=False)
    assert next_commands("model", writes=False, scored=True) == "trained: model"
