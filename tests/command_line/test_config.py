"""Flags, look-up of gin files, overrides and the messages for gin's mistakes, on a small verb of its own."""

import os
import subprocess
import sys

import gin
import jax
import pytest
from toy import SET, error_of, verb

from diffusion_t5x.command_line import config, gin_reading
from diffusion_t5x.errors import UserError


def bound(toy, *bindings, files=("base.gin",)):
    """Returns the bindings of the toy verb's arguments, macros resolved."""
    config.load(files, ["MODEL_DIR = '/tmp/m'", "WIDTH = 8", *bindings], search_paths=[str(toy)], allowed=["toy_verbs"])
    from toy_verbs import train

    return gin.get_bindings(train.train)


def test_verb_runs_with_flags_and_macros(toy):
    result = verb(toy, "--gin_file=base.gin", "--gin_file=configs/longer.gin", *SET, "--gin.train.train.task='code'")
    assert result.returncode == 0, result.stderr
    assert "model_dir='/tmp/m'" in result.stdout
    assert "objective=Sundae(model=Model(width=8, depth=2, layers=[]), num_unrolls=1)" in result.stdout
    assert "train_steps=200 task='code' dry_run=False" in result.stdout
    assert result.stderr == ""
    for flag in ("--dry_run", "--gin.train.train.dry_run=True"):
        assert "dry_run=True" in verb(toy, "--gin_file=base.gin", *SET, flag).stdout


def test_later_files_and_bindings_win(toy):
    assert bound(toy)["train_steps"] == 100
    assert bound(toy, files=["base.gin", "configs/longer.gin"])["train_steps"] == 200
    assert bound(toy, files=["configs/longer.gin", "base.gin"])["train_steps"] == 100
    assert bound(toy, "TRAIN_STEPS = 5", "TRAIN_STEPS = 6")["train_steps"] == 6
    assert bound(toy, "train.train.train_steps = 7")["train_steps"] == 7
    assert bound(toy, "models.Sundae.num_unrolls = 0")["objective"].num_unrolls == 0
    assert bound(toy)["objective"].num_unrolls == 1  # nothing stays from the load before


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("code", "code"),
        ("gs://bucket/run-1/checkpoint_100", "gs://bucket/run-1/checkpoint_100"),
        ("../runs/a.b", "../runs/a.b"),
        ("'quoted'", "quoted"),
        ('"quoted"', "quoted"),
        ("None", None),
        ("True", True),
        ("-1e-3", -1e-3),
        ("{'inputs': 64, 'targets': [1, 2]}", {"inputs": 64, "targets": [1, 2]}),
        ("'a=b'", "a=b"),
        ("%TRAIN_STEPS", 100),
    ],
)
def test_values_on_the_command_line(toy, value, expected):
    assert bound(toy, f"train.train.task = {value}")["task"] == expected
    assert bound(toy, f"train.train.task={value}")["task"] == expected


def test_the_command_line_names_what_files_could(toy):
    """A function of a module that base.gin imports but does not mention."""
    for name in ("@models.warmup", "@slow/models.warmup"):
        flags = ["--gin_file=base.gin", *SET, f"--gin.train.train.schedule={name}", "--print_config"]
        printed = verb(toy, *flags)
        assert printed.returncode == 0, printed.stderr
        assert f"train.train.schedule = {name}\n" in printed.stdout and "\n_ = " not in printed.stdout


@pytest.mark.parametrize("value", ["two words", "1e-3x", "{'inputs': 64", "'open", "", "a,b", "$HOME", "10 20"])
def test_other_bare_values_must_be_quoted(toy, value):
    with pytest.raises(UserError, match=r"^--gin\.train\.train\.task=.*not a gin value\. Quote a string: --gin"):
        bound(toy, f"train.train.task={value}")


def test_lower_case_constants_are_not_strings(toy):
    with pytest.raises(UserError, match="gin spells it False"):
        bound(toy, "train.train.task=false")


def test_home_folder_is_expanded(toy, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert bound(toy, "train.train.task=~/runs")["task"] == "/home/me/runs"


def test_gin_files_are_found_from_any_folder(toy, tmp_path, monkeypatch):
    for files in (["base.gin"], [str(toy / "base.gin")]):
        assert bound(toy, files=files)["train_steps"] == 100
    assert (
        verb(toy, f"--gin_file={toy}/configs/beside.gin", f"--gin_search_paths={toy}", *SET, cwd=tmp_path).returncode
        == 0
    )

    # Stands for the package: its gin folder is the last place.
    shipped = tmp_path / "package"
    (shipped / "gin/runs").mkdir(parents=True)
    (shipped / "gin/runs/pretrain.gin").write_text("include 'gin/sizes/tiny.gin'\nTRAIN_STEPS = 3\n")
    (shipped / "gin/sizes").mkdir()
    (shipped / "gin/sizes/tiny.gin").write_text(f"include '{toy}/base.gin'\n")
    monkeypatch.setattr(config, "PACKAGE", shipped)
    monkeypatch.setattr(gin_reading, "SHIPPED", shipped / "gin")
    monkeypatch.chdir(tmp_path)  # the current folder comes first
    for file in ("runs/pretrain.gin", "gin/runs/pretrain.gin", "package/gin/runs/pretrain.gin"):
        assert bound(toy, files=[file])["train_steps"] == 3
    with pytest.raises(UserError, match=r"no gin file 'runs/pretrian.gin'. Did you mean 'runs/pretrain.gin'\?"):
        config.load(["runs/pretrian.gin"])
    with pytest.raises(
        UserError, match=r"x.gin:2: there is no gin file 'sizes/tini.gin'. Did you mean 'sizes/tiny.gin'\?"
    ):
        (tmp_path / "x.gin").write_text("A = 1\ninclude 'sizes/tini.gin'\n")
        config.load([str(tmp_path / "x.gin")])


def test_every_shipped_gin_file_parses():
    for file in gin_reading.shipped():
        config.load([file])


def test_print_config_can_be_loaded_again(toy, tmp_path):
    longer = ("--gin_file=warmup.gin", "--gin_file=configs/longer.gin")
    longer += ("--gin.train.train.objective=@scope/models.Sundae()", "--gin.scope/models.Sundae.num_unrolls=3")
    longer += ("--gin.train.train.schedule=@warmup",)
    result = verb(toy, *longer, *SET, "--print_config")
    assert result.returncode == 0, result.stderr
    for line in (
        "TRAIN_STEPS = 200",
        "MODEL_DIR = '/tmp/m'",
        "train.train.train_steps = %TRAIN_STEPS",
        "train.train.task = 'books'",  # a default
        "models.Model.depth = 2",  # a default of a class that only a macro mentions
        "scope/models.Sundae.num_unrolls = 3",
    ):
        assert line in result.stdout.splitlines()
    assert "dry_run" not in result.stdout
    assert "model_dir=" not in result.stdout  # nothing ran

    written = tmp_path / "config.gin"
    written.write_text(result.stdout)
    again = verb(toy, f"--gin_file={written}", "--print_config", cwd=tmp_path)
    assert again.stdout == result.stdout
    assert (
        verb(toy, f"--gin_file={written}", "--gin.train.train.schedule=None").stdout
        == verb(toy, *longer[:-1], *SET).stdout
    )
    # The verb itself reads the same text.
    inside = verb(toy, f"--gin_file={written}", "--gin.train.train.task=text").stdout
    assert inside.split("\n", 2)[2].replace("'text'", "'books'") == result.stdout


def test_print_config_shows_what_is_still_open(toy):
    result = verb(toy, "--gin_file=base.gin", "--print_config")
    assert result.returncode == 2
    assert "MODEL_DIR = %gin.REQUIRED" in result.stdout
    assert "not set: MODEL_DIR, WIDTH" in result.stderr


def test_functions_as_values_get_their_bindings(toy):
    arguments = ["--gin_file=base.gin", *SET, "--gin.train.train.schedule=@warmup"]
    assert "no gin file that was read mentions 'warmup'" in error_of(toy, *arguments)
    assert "schedule 1.5" in verb(toy, "--gin_file=warmup.gin", *arguments).stdout
    assert "schedule 6.0" in verb(toy, "--gin_file=warmup.gin", *arguments, "--gin.warmup.peak=2.").stdout


def test_help(toy):
    result = verb(toy, "--help")
    assert result.returncode == 0
    for part in (
        "Trains a toy.",
        "--gin_file",
        "--gin.NAME=VALUE",
        "--dry_run",
        "--print_config",
        "--gin_search_paths",
    ):
        assert part in result.stdout


def test_logs_are_terse_and_quiet(toy):
    result = verb(toy, "--gin_file=base.gin", *SET, "--gin.train.train.task=log", "--tfds_data_dir=/data")
    assert result.stderr.splitlines()[0].endswith(" resuming") and len(result.stderr.splitlines()) == 1
    assert "3 /data\n[]\n" in result.stdout  # and config needs neither JAX nor TensorFlow


@pytest.mark.parametrize("value", ["1", "True", "true"])
def test_a_shell_with_64_bits_is_set_aside(value, monkeypatch, capsys):
    monkeypatch.setattr(config.logging.getLogger("diffusion_t5x"), "handlers", [])  # none of pytest's
    monkeypatch.setenv("JAX_ENABLE_X64", value)
    jax.config.update("jax_enable_x64", True)
    with config.program():
        assert not jax.config.jax_enable_x64 and "JAX_ENABLE_X64" not in os.environ
    assert capsys.readouterr().err.count("JAX_ENABLE_X64 is ignored") == 1


def test_a_required_macro_may_be_set_late(toy):
    assert bound(toy, "WIDTH = %TRAIN_STEPS")["objective"].model.width == 100
    assert "not set: TRAIN_STEPS" in error_of(toy, "--gin_file=base.gin", *SET, "--gin.TRAIN_STEPS=%gin.REQUIRED")
    # What nothing evaluates need not be set.
    assert (
        verb(toy, "--gin_file=base.gin", "--gin.MODEL_DIR=/tmp/m", "--gin.train.train.objective=None").returncode == 0
    )


FORMER_NAME = """
from diffusion_t5x.command_line import config

former = (
    "from __gin__ import dynamic_registration\\nfrom diffusion_t5x.tasks import registration\\n"
    "VOCABULARY = @registration.vocabulary()\\nregistration.vocabulary.file = 'former.model'\\n"
)
config.load(["runs/lm_eval.gin"], ["VOCABULARY_FILE = None"], texts={"the record of DIR": former})
assert config.operative_text().count("vocabulary.file = ") == 1
name = "diffusion_t5x.data.vocabulary_files.vocabulary"
assert config.registration("VOCABULARY")["bindings"]["VOCABULARY"]["@"] == name
config.load([], [], texts={"the record of DIR": former})
bound = config.registration("VOCABULARY")["bindings"]
assert bound == {"VOCABULARY": {"@": name, "call": True}, f"{name}.file": "former.model"}
"""


def test_the_former_name_of_a_vocabulary_by_its_file_is_the_same_setting():
    done = subprocess.run([sys.executable, "-c", FORMER_NAME], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
