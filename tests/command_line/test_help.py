"""The command: its verbs, their help without what is slow to import, suggestions, completion, the macro reference."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from diffusion_t5x.command_line import completion, gin_macros, help_pages, macro_reference
from diffusion_t5x.command_line.gin_reading import shipped
from diffusion_t5x.command_line.main import main
from diffusion_t5x.command_line.verbs import VERBS

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEAVY = ("jax", "numpy", "tensorflow", "flax", "seqio", "optax", "orbax", "grain")
# Prints, when the process ends, what of it has been imported.
PROBE = f"""
import atexit, json, sys
atexit.register(lambda: print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr))
"""


def run(*words, probe=None):
    """A Python process in the checkout; with a folder `probe`, its last line on stderr names the heavy imports."""
    path = [str(ROOT)]
    if probe:
        (probe / "sitecustomize.py").write_text(PROBE)
        path.insert(0, str(probe))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "diffusion_t5x"],
        ["-m", "diffusion_t5x", "--help"],
        *(["-m", "diffusion_t5x", *verb.split(), "--help"] for verb in VERBS),
        *(["-m", "diffusion_t5x." + verb.replace(" ", "\t"), "-h"] for verb in VERBS if VERBS[verb].takes_gin),
        *(["-m", f"diffusion_t5x.{verb}", "--help"] for verb in ("report", "checkpoints", "convert", "benchmark")),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(words, tmp_path):
    done = run(*(part for word in words for part in word.split("\t")), probe=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert "diffusion-t5x" in done.stdout or "decode" in done.stdout


def test_what_is_heavy_would_be_noticed(tmp_path):
    done = run("-c", "import diffusion_t5x.train", probe=tmp_path)
    assert {"jax", "numpy", "flax", "optax"} <= set(json.loads(done.stderr.splitlines()[-1]))


def test_the_list_has_a_line_for_each_verb(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    for verb, about in VERBS.items():
        assert sum(line.startswith(f"  {verb} ") and line.endswith(f" {about.summary}") for line in lines) == 1


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if verb.takes_gin])
def test_the_help_of_a_verb_shows_its_flags_an_example_and_its_macros(name, capsys):
    main([*name.split(), "--help"])
    page = capsys.readouterr().out
    for flag in [*VERBS[name].flags, "--gin_file", "--print_config"]:
        assert flag in page
    assert f"diffusion-t5x {name} " in page.partition("example:")[2]
    for run_file in VERBS[name].runs:
        for macro in gin_macros.read(run_file).values:
            assert re.search(rf"^  {macro} (=|\(required\))", page, re.MULTILINE), macro


def test_an_example_can_be_pasted():
    example = help_pages.parser("eval").format_help().partition("example:\n")[2].partition("\n\n")[0]
    assert shlex.split(example.replace("\\\n", ""))[1:] == shlex.split(VERBS["eval"].example)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("trian", "Did you mean 'train'?"), ("evel", "Did you mean 'eval'"), ("xyz", "The verbs are")],
)
def test_an_unknown_verb_is_one_line_with_a_suggestion(word, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([word, "--help"] if word == "evel" else [word])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and expected in message and message.count("\n") == 1


def test_a_verb_runs_as_its_module_does(tmp_path):
    wrong = run("-m", "diffusion_t5x", "checkpoints", "lst", "x")
    assert wrong.returncode == 2 and "invalid choice: 'lst'" in wrong.stderr and wrong.stderr.count("\n") == 1
    done = run("-m", "diffusion_t5x", "checkpoints", "verify", str(tmp_path))
    assert done.returncode == 2 and str(tmp_path) in done.stderr


def test_the_version_is_told(capsys):
    main(["--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_env_names_versions_and_devices():
    done = run("-m", "diffusion_t5x", "env")
    assert done.returncode == 0, done.stderr
    for name in (
        "diffusion_t5x",
        "python",
        "platform",
        "jax",
        "jaxlib",
        "flax",
        "orbax-checkpoint",
        "seqio",
        "devices",
    ):
        assert re.search(rf"^{name} +\S", done.stdout, re.MULTILINE), name


@pytest.mark.slow
def test_tasks_names_gin_files_and_what_they_register():
    done = run("-m", "diffusion_t5x", "tasks", "quickstart")
    assert done.returncode == 0, done.stderr
    assert "--gin_file=tasks/quickstart.gin" in done.stdout and "quickstart_pairs" in done.stdout
    assert "wmt14" not in done.stdout
    missing = run("-m", "diffusion_t5x", "tasks", "nothing_like_it")
    assert missing.returncode == 2 and missing.stderr.splitlines()[-1].startswith("error: No task")


def test_every_shipped_task_file_has_a_family():
    from diffusion_t5x.command_line import task_list

    listed = [file for files in task_list.families().values() for file in files]
    assert sorted(listed) == shipped("tasks")
    assert "tasks/squad.gin" in task_list.families()["question_answering"]
    assert any("--gin.FILES=..." in line for line in task_list.describe("tasks/local_jsonl.gin"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("diffusion-t5x ev", ["eval"]),
        ("diffusion-t5x checkpoints v", ["verify"]),
        ("diffusion-t5x benchmark d", ["decode"]),
        ("diffusion-t5x infer --tr", ["--trace"]),
        ("diffusion-t5x train --gin_file=sizes/l", ["sizes/large.gin", "sizes/llada2_mini.gin", "sizes/llama3_8b.gin"]),
        ("diffusion-t5x train --gin_file=a.gin --gin.TRAIN_S", ["--gin.TRAIN_STEPS="]),
    ],
)
def test_completion_in_bash(line, expected, tmp_path):
    script = tmp_path / "script"
    # What bash sets: it splits words at "=".
    script.write_text(
        completion.script("bash")
        + f'COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=({line.replace("=", " = ")})\n'
        + 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _diffusion_t5x 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=20)
    assert done.stdout.split() == expected, done.stderr
    assert completion.script("zsh").startswith("autoload")


def test_the_macro_reference_is_up_to_date():
    page = (ROOT / macro_reference.PAGE).read_text(encoding="utf-8")
    assert page == macro_reference.render(), "run: python -m diffusion_t5x.command_line.macro_reference"


def test_every_macro_is_in_the_reference_with_a_meaning():
    page = (ROOT / macro_reference.PAGE).read_text(encoding="utf-8")
    texts = [(ROOT / "gin" / file).read_text(encoding="utf-8") for file in shipped()]
    named = {name for text in texts for name in re.findall(r"^([A-Z][A-Z0-9_]+) = ", text, re.MULTILINE)}
    assert named == set(re.findall(r"^## (\w+)$", page, re.MULTILINE))
    for macro in gin_macros.macros().values():
        assert macro.meaning(), macro.name
    assert set(gin_macros._MEANINGS) <= named
