"""The command line and the journal of ar2diff: what is refused, and what goes on."""

import json
import pathlib

import pytest

from diffusion_t5x.ar2diff import command as commands
from diffusion_t5x.ar2diff.journal import Journal
from diffusion_t5x.errors import UserError


@pytest.fixture
def text(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    return tmp_path / "a.txt"


def test_the_shipped_routes_are_found():
    assert {"shifted", "in_place", "joint", "opdlm", "sundae"} <= commands.routes().keys()
    assert commands.routes()["opdlm"] == "recipes/ar2diff/opdlm.gin"


def test_a_command_is_read_with_absolute_paths(text):
    given = ["org/name", "--data", "*.txt", "--output", "x", "--gin.LORA=None", "--tokens", "7", "--plan"]
    command, only_plan = commands.parse(given)
    assert only_plan and command.model == "org/name" and command.kind == "data" and command.tokens == 7
    assert command.files == (str(text.parent / "*.txt"),) and command.output == text.parent / "x"
    assert command.gin_flags == ["--gin.LORA=None"] and command.describe()["--minutes"] is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--output x", "by one flag, --data, --prompts or --chat, not none"),
        ("--output x --data a.txt --chat a.txt", "not data and chat"),
        ("--data a.txt", "--output"),
        ("--output x --data missing.txt", "missing.txt"),
        ("--output x --data a.txt --tokens 0", "--tokens must be above 0, not 0"),
        ("--output x --data a.txt --tokens 5 --minutes 5", "not both"),
        ("--output x --data a.txt --route shiftd", "Did you mean 'shifted'"),
        ("--output x --data a.txt --gin.TRAIN_STEPS=5", "ar2diff sets TRAIN_STEPS itself. Use --tokens."),
        ("--output x --data a.txt --gin.LORA", "with an equals sign"),
        ("--output x --data a.txt --token 5", "Did you mean '--tokens'"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(text, flags, expected):
    with pytest.raises(UserError) as refused:
        commands.parse(["model", *flags.split()])
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_a_stage_is_remembered(tmp_path):
    journal = Journal(tmp_path, {"MODEL": "a"})
    assert journal.done("import") is None
    journal.mark("import", "start")
    assert Journal(tmp_path, {"MODEL": "a"}).done("import") == "start"


def test_before_training_a_changed_command_is_planned_anew(tmp_path):
    journal = Journal(tmp_path, {"MODEL": "a", "--tokens": 5})
    journal.mark("import", "start")
    journal.mark("plan", {"steps": 1})
    changed = Journal(tmp_path, {"MODEL": "a", "--tokens": 6})
    assert changed.done("import") == "start" and changed.done("plan") is None
    with pytest.raises(UserError, match="MODEL was a, now it is b"):
        Journal(tmp_path, {"MODEL": "b", "--tokens": 5})


def test_once_it_has_begun_a_changed_command_is_refused(tmp_path):
    journal = Journal(tmp_path, {"MODEL": "a", "--tokens": 5, "--gin": []})
    journal.mark("score start", {})
    with pytest.raises(
        UserError, match="--tokens was 5, now it is 6; --gin was not given, now it is LORA=None"
    ) as refused:
        Journal(tmp_path, {"MODEL": "a", "--tokens": 6, "--gin": ["LORA=None"]})
    assert "\n" not in str(refused.value)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty, and was not created by ar2diff"):
        Journal(tmp_path, {})
    (tmp_path / "ar2diff.json").write_text(json.dumps({"command": {}}))
    with pytest.raises(UserError, match="is damaged"):
        Journal(tmp_path, {})
