"""Mistakes in gin files and on the command line: one line each, with a suggestion."""

import pytest
from toy import SET, error_of, verb

from diffusion_t5x.command_line import config, gin_messages, gin_reading
from diffusion_t5x.errors import UserError


def test_shipped_files_are_suggested(tmp_path, monkeypatch):
    (tmp_path / "gin/models").mkdir(parents=True)
    (tmp_path / "gin/runs").mkdir()
    (tmp_path / "gin/models/small.gin").write_text("MODEL = @models.Model()\n")
    (tmp_path / "gin/runs/pretrain.gin").write_text("MODEL_DIR = %gin.REQUIRED\nMODEL = %gin.REQUIRED\nSTEPS = 1\n")
    (tmp_path / "gin/runs/infer.gin").write_text("")
    monkeypatch.setattr(gin_reading, "SHIPPED", tmp_path / "gin")
    assert gin_messages._shipped_values("MODEL") == "; MODEL is set in models/small.gin"
    assert gin_messages._shipped_values("MODEL_DIR") == ""


def test_user_errors_and_bugs(toy):
    result = verb(toy, "--gin_file=base.gin", *SET, "--gin.train.train.task=missing")
    assert (result.returncode, result.stderr) == (2, "error: there is no task 'missing'\n")
    result = verb(toy, "--gin_file=base.gin", *SET, "--gin.train.train.task=bug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "ZeroDivisionError: a bug" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin_file=bsae.gin"], "there is no gin file 'bsae.gin'."),
        (["--gin_file=base.gin"], "not set: MODEL_DIR, WIDTH. Set on the command line (--gin.MODEL_DIR=... --gin.W"),
        (["--gin_file=base.gin", "--gin.WIDTH=8"], "not set: MODEL_DIR."),
        ([], "not set: train.train.model_dir, train.train.objective."),
        ([], "no --gin_file was given (--help shows examples); not set"),
        (
            ["--gin_file=base.gin", *SET, "--gin.TRIAN_STEPS=5"],
            "--gin.TRIAN_STEPS=5: nothing in this configuration uses",
        ),
        (["--gin_file=base.gin", *SET, "--gin.TRIAN_STEPS=5"], "Did you mean 'TRAIN_STEPS'?"),
        (["--gin_file=base.gin", *SET, "--gin.train_steps=5"], "Did you mean 'TRAIN_STEPS'?"),
        (["--gin_file=base.gin", *SET, "--gin.train.train.train_step=5"], "Did you mean 'train_steps'?"),
        (
            ["--gin_file=base.gin", *SET, "--gin.train.train.zzz=5"],
            "train.train has no parameter 'zzz'. It has ['model_dir',",
        ),
        (["--gin_file=base.gin", *SET, "--gin.models.Sundea.num_unrolls=5"], "Did you mean 'models.Sundae'?"),
        (["--gin_file=base.gin", *SET, "--gin.Sundea.num_unrolls=5"], "Did you mean 'Sundae'?"),
        (
            ["--gin_file=base.gin", *SET, "--gin.MODEL=@models.Modell()"],
            "models has no 'Modell'. Did you mean 'Model'?",
        ),
        (["--gin_file=base.gin", *SET, "--gin.MODEL=@model.Model()"], "--gin.MODEL=@model.Model(): no gin file"),
        (["--gin_file=base.gin", *SET, "--gin.MODEL=@models"], "--gin.MODEL=@models: no gin file"),
        (["--gin_file=base.gin", *SET, "--gin.train.train.task=%OTHER"], "not set: OTHER."),
        (["--gin_file=base.gin", *SET, "--gin.TRAIN_STEPS"], "--gin.TRAIN_STEPS: write --gin.NAME=VALUE"),
        (["--gin_fil=base.gin"], "unrecognized arguments: --gin_fil=base.gin. Did you mean '--gin_file'?"),
    ],
)
def test_mistakes_on_the_command_line(toy, arguments, message):
    assert message in error_of(toy, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.train.task = 'x'", "4: 'train' is not imported in this file."),
        ("modls.Model.width = 3", "4: 'modls' is not imported in this file. Did you mean 'models'?"),
        ("models.Modle.width = 3", "4: toy_verbs.models has no 'Modle'. Did you mean 'Model'?"),
        ("models.Model.widht = 3", "4: models.Model has no parameter 'widht'. Did you mean 'width'?"),
        ("M = @models.Modle()", "4: toy_verbs.models has no 'Modle'. Did you mean 'Model'?"),
        ("from toy_verbs import modles", "4: there is no module 'toy_verbs.modles'. Did you mean 'models'?"),
        ("from toy_verb import models", "4: there is no module 'toy_verb'."),
        ("A = 'x'\nB = (1,\n", "EOF in multi-line statement"),
        ("A = three", "4: malformed node or string"),
        ("A = 1 2", "4: Expected newline."),
        ("A 1", "4: Couldn't parse statement"),
        ("include 'other.gin'", "other.gin:1: Couldn't parse statement"),
        ("include 'unclosed.gin'", "unclosed.gin:"),
        ("include 'none.gin'", "mistake.gin:4: there is no gin file 'none.gin'."),
    ],
)
def test_mistakes_in_gin_files(toy, tmp_path, text, message):
    (tmp_path / "other.gin").write_text("B 1\n")
    (tmp_path / "unclosed.gin").write_text("B = (1,\n")
    imports = "# A comment.\nfrom __gin__ import dynamic_registration\nfrom toy_verbs import models\n"
    (tmp_path / "mistake.gin").write_text(f"{imports}{text}\n")
    with pytest.raises(UserError) as caught:
        config.load([str(tmp_path / "mistake.gin")], allowed=["toy_verbs", "toy_verb"])
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_broken_module_keeps_its_traceback(toy, tmp_path):
    (tmp_path / "broken.gin").write_text("from __gin__ import dynamic_registration\nfrom toy_verbs import broken\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        config.load([str(tmp_path / "broken.gin")], allowed=["toy_verbs"])
