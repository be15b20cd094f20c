"""Types and values of settings, and the one of two values that stays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import gin
import pytest

from diffusion_t5x import train
from diffusion_t5x.command_line import config, gin_messages, gin_reading
from diffusion_t5x.command_line.setting_types import Misfit, WholeNumber, fit, fits_call, words
from diffusion_t5x.errors import UserError

MODEL = ["models/decoder_only.gin", "sizes/tiny.gin", "objectives/sundae.gin", "decoding/sundae.gin"]
TASK, RUN = ["tasks/local_jsonl.gin"], ["runs/finetune.gin"]


class Runs(Protocol):
    def run(self, steps: int) -> int: ...


class Runner:
    def run(self, steps: int) -> int:
        return steps


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 0


def refer(value, hint):
    return NotImplemented


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (WholeNumber(1e6), int, 1_000_000),
        (WholeNumber(1e6), float, 1e6),
        (WholeNumber(1e6), float | None, 1e6),
        (WholeNumber(1e6), int | float, 1_000_000),
        (3, float, 3),
        (3, int | bool, 3),
        (True, int | bool, True),
        (None, int | None, None),
        ("a", Literal["a", "b"], "a"),
        ([1, 2], Sequence[int], [1, 2]),
        ((1, 2), Sequence[int], (1, 2)),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ("train", str | Sequence[str], "train"),
        ({"train": ["a", "b"]}, Mapping[str, str | Sequence[str]], {"train": ["a", "b"]}),
        ({"a": WholeNumber(1e3)}, Mapping[str, int], {"a": 1000}),
        ([("step|.*", None)], Sequence[tuple[str, str | None]], [("step|.*", None)]),
        (3, Any, 3),
        (3, "a name nobody knows", 3),
    ],
)
def test_what_fits(value, hint, expected):
    found = fit(value, hint, refer)
    assert found == expected
    assert type(found) is type(expected) or isinstance(value, WholeNumber)


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        (1.5, int, "a whole number"),
        (1.0, int, "a whole number"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        ("2", int, "a whole number"),
        (None, int, "a whole number"),
        (20240501, str, "text"),
        (1, bool, "True or False"),
        ("c", Literal["a", "b"], "'a' or 'b'"),
        (True, Literal[1, 2], "1 or 2"),
        ("path", Sequence[str], "a list of text"),
        ([1], Sequence[str], "a list of text"),
        ("path", Mapping[str, str], "a dict {text: text}"),
        ({"train": None}, Mapping[str, str], "a dict {text: text}"),
        ([1, 2, 3], tuple[int, int], "(a whole number, a whole number)"),
        (3, Callable[..., Any], "a function"),
        (3, Settings, "a Settings"),
        (3, Runs, "a Runs"),
        (3, str | None, "text or None"),
    ],
)
def test_what_does_not_fit(value, hint, said):
    with pytest.raises(Misfit):
        fit(value, hint, refer)
    assert words(hint) == said


@pytest.mark.parametrize(
    ("returned", "hint", "fits"),
    [
        (Settings, Settings, True),
        (Settings, Settings | None, True),
        (Settings, Runner, False),
        (Runner, Runs, True),
        (Settings, Runs, False),
        (Any, Settings, True),
        (object, Settings, False),
        (str, Sequence[str], True),
        (int, float, True),
        (str, int, False),
        (str | None, str, True),
        (Callable[[int], float], float | Callable[[int], float], True),
    ],
)
def test_what_a_call_returns_may_fit(returned, hint, fits):
    assert fits_call(returned, hint) == fits


def resolved(files, *flags):
    """The configuration of a training run as text."""
    config.load(files, flags)
    return config.operative_text()


def test_whole_numbers_may_be_written_with_an_exponent(capsys):
    run_file = ["--gin_file=recipes/quickstart/pretrain_ar.gin", "--gin.MODEL_DIR=made", "--print_config"]
    config.run(train.train, [*run_file, "--gin.TRAIN_STEPS=1e3", "--gin.BATCH_SIZE=2e1"])
    lines = capsys.readouterr().out.splitlines()
    assert "TRAIN_STEPS = 1000" in lines and "BATCH_SIZE = 20" in lines and "MODEL_DIR = 'made'" in lines


ORDERS = [
    [*MODEL, *TASK, *RUN],
    [*MODEL, *RUN, *TASK],
    [*TASK, *RUN, *MODEL],
    [*RUN, *MODEL[::-1], *TASK],
    ["sizes/tiny.gin", "decoding/sundae.gin", *RUN, "objectives/sundae.gin", *TASK, "models/decoder_only.gin"],
]


@pytest.mark.parametrize("files", ORDERS[1:], ids=range(1, len(ORDERS)))
def test_the_order_of_files_does_not_matter(files):
    assert resolved(files) == resolved(ORDERS[0])


@pytest.mark.parametrize("task", ["math500", "tatoeba_enfr", "wmt14", "squad", "c4_code", "token_ids", "local_chat"])
def test_a_task_may_come_before_its_run(task):
    files = [*MODEL, f"tasks/{task}.gin"]
    assert resolved([*files, *RUN]) == resolved([*MODEL, *RUN, f"tasks/{task}.gin"])


def test_a_run_file_sets_defaults_and_required_unsets_nothing(tmp_path):
    (tmp_path / "mine.gin").write_text("BATCH_SIZE = 7\nTRAIN_STEPS = 5\n")
    (tmp_path / "needs.gin").write_text("TRAIN_STEPS = %gin.REQUIRED\nBATCH_SIZE = 9\n")
    mine, needs = str(tmp_path / "mine.gin"), str(tmp_path / "needs.gin")
    lines = resolved([mine, *RUN]).splitlines()
    assert "BATCH_SIZE = 7" in lines and "TRAIN_STEPS = 5" in lines
    lines = resolved([mine, *RUN, needs]).splitlines()  # among files of one's own the later one wins
    assert "BATCH_SIZE = 9" in lines and "TRAIN_STEPS = 5" in lines
    # A file says the last word about what it includes, adapt.gin about INITIAL_CHECKPOINT_PATH of pretrain.gin.
    assert "INITIAL_CHECKPOINT_PATH = %gin.REQUIRED" in resolved(["runs/adapt.gin"]).splitlines()
    (tmp_path / "asks.gin").write_text(f"include '{mine}'\nTRAIN_STEPS = %gin.REQUIRED\n")
    assert "TRAIN_STEPS = %gin.REQUIRED" in resolved([str(tmp_path / "asks.gin")]).splitlines()


def test_a_flag_wins_in_every_scope_and_says_what_it_replaced(caplog):
    files = [*MODEL, *RUN, "decoding/block.gin"]
    with caplog.at_level("INFO", "diffusion_t5x"):
        text = resolved(files, "MaskedDecoder.num_steps = 2")
    assert "masked_decoding.MaskedDecoder.num_steps = 2\n" in text and "num_steps = 4" not in text
    assert (
        "--gin.MaskedDecoder.num_steps=2 replaces in_block/masked_decoding.MaskedDecoder.num_steps = 4" in caplog.text
    )
    assert "decoding/block.gin:" in caplog.text
    # A flag for a scope stays beside one without, whichever comes first.
    for flags in (["MaskedDecoder.num_steps = 2", "in_block/MaskedDecoder.num_steps = 3"],) * 2:
        lines = resolved(files, *flags).splitlines()
        assert "in_block/masked_decoding.MaskedDecoder.num_steps = 3" in lines
        assert "masked_decoding.MaskedDecoder.num_steps = 2" in lines
        flags.reverse()


def test_a_broken_default_of_the_code_is_not_the_users(tmp_path):
    """`def f(x: int = None)`: None is what the code itself has."""

    def sloppy(*, steps: int = None, name: "NotImported" = 3, untyped=None):  # noqa: F821, RUF013
        return steps, name, untyped

    sloppy.__module__ = "sloppy_verbs.sloppy"
    gin.register(sloppy, module="sloppy_verbs")
    config.load([], ["sloppy.steps = None", "sloppy.name = 'x'", "sloppy.untyped = [1]"])
    config.gin_checks.check_types(sloppy)
    config.load([], ["sloppy.steps = 'x'"])
    with pytest.raises(UserError, match=r"--gin\.sloppy\.steps='x': .*sloppy\.steps must be a whole number, not 'x'"):
        config.gin_checks.check_types(sloppy)


def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path, capsys):
    (tmp_path / "mine.gin").write_text("# mine\nTRAIN_STEPS = 'many'\n")
    files = ["--gin_file=recipes/quickstart/pretrain_ar.gin", f"--gin_file={tmp_path}/mine.gin", "--gin.MODEL_DIR=made"]
    with pytest.raises(SystemExit):
        config.run(train.train, files)
    said = capsys.readouterr().err
    assert f"error: {tmp_path}/mine.gin:2: TRAIN_STEPS = 'many': " in said and "must be a whole number" in said


def test_the_decoder_that_goes_with_the_objective_is_named():
    config.load(["objectives/block.gin"])
    assert "decoding/block.gin, which goes with the objective" in gin_messages.not_set(["DECODER"])


def test_each_shipped_run_has_a_learning_rate():
    for run in ("pretrain", "adapt", "finetune", "distil"):
        config.load([f"runs/{run}.gin"], ["LEARNING_RATE = 0.5"])
        assert gin_reading.set_by_flags()
