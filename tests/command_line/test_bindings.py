"""Settings of the command line as text: a gin file with them means what the flags meant."""

import pytest

from diffusion_t5x.command_line import bindings, config

FILE = "recipes/quickstart/pretrain_ar.gin"


@pytest.mark.parametrize(
    "given",
    [
        ["TRAIN_STEPS=7", "MODEL_DIR=/tmp/x"],
        ["ModelConfig.dropout_rate=0.25", "train.train.ema_decay=0.9"],
        ["train.train.optimizer=@optimizers.adamw()", "optimizers.adamw.learning_rate=@schedules.constant()"],
        ["train/SeqioDataset.seed=5"],
    ],
    ids=" ".join,
)
def test_the_text_sets_what_the_flags_set(given, tmp_path):
    config.load([FILE], given)
    expected, text = config.operative_values(), bindings.as_text(given)
    file = tmp_path / "recipe.gin"
    file.write_text(f'from __gin__ import dynamic_registration\ninclude "{FILE}"\n{text}')
    config.load([str(file)])
    assert config.operative_values() == expected


def test_no_bindings_are_no_text():
    config.load([FILE])
    assert bindings.as_text([]) == ""


def test_a_text_with_an_at_sign_stays():
    given = ["MODEL_DIR='me@there'"]
    config.load([FILE], given)
    assert "MODEL_DIR = 'me@there'" in bindings.as_text(given)
