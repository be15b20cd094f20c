"""Flags, look-up of gin files, overrides and the messages for gin's mistakes, on a small verb of its own."""

import os
import subprocess
import sys

import gin
import jax
import pytest

from diffusion_t5x.command_line import config, gin_messages, gin_reading
from diffusion_t5x.errors import UserError

MODELS = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Model:
    width: int
    depth: int = 2
    layers: list = dataclasses.field(default_factory=list)

@dataclasses.dataclass(frozen=True)
class Sundae:
    model: Model
    num_unrolls: int = 1

def warmup(steps, peak=1.0):
    return steps * peak
"""
TRAIN = '''
"""Trains a toy."""
import logging
import os
import sys

from diffusion_t5x.command_line import config, gin_messages, gin_reading
from diffusion_t5x.errors import UserError

def train(*, model_dir, objective, train_steps: int = 10, schedule=None, task="books", dry_run: bool = False):
    """Prints the settings that the toy verb got."""
    print(f"{model_dir=} {objective=} {train_steps=} {task=} {dry_run=}")
    if schedule:
        print("schedule", schedule(steps=3))
    if task == "missing":
        raise UserError("there is no task 'missing'")
    if task == "bug":
        raise ZeroDivisionError("a bug")
    if task == "log":
        logging.getLogger("diffusion_t5x.training").info("resuming")
        logging.getLogger("other").info("chatter")
        print(os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TFDS_DATA_DIR"])
        print([module for module in ("jax", "tensorflow") if module in sys.modules])
    if task == "text":
        print(config.operative_text())

if __name__ == "__main__":
    config.run(train)
'''
BASE_GIN = """\
from __gin__ import dynamic_registration
from toy_verbs import models
from toy_verbs import train

MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = 100
WIDTH = %gin.REQUIRED
MODEL = @models.Model()

train.train:
  model_dir = %MODEL_DIR
  objective = @models.Sundae()
  train_steps = %TRAIN_STEPS
models.Sundae.model = %MODEL
models.Model.width = %WIDTH
"""
SET = ["--gin.MODEL_DIR=/tmp/m", "--gin.WIDTH=8"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the package `toy_verbs` and gin files; on sys.path for the tests of this file."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_verbs").mkdir()
    (folder / "configs").mkdir()
    for path, text in {
        "toy_verbs/__init__.py": "",
        "toy_verbs/models.py": MODELS,
        "toy_verbs/train.py": TRAIN,
        "toy_verbs/broken.py": "import a_library_that_is_missing\n",
        "base.gin": BASE_GIN,
        "warmup.gin": BASE_GIN[: BASE_GIN.index("MODEL_DIR")] + "models.warmup.peak = 0.5\n",
        "configs/longer.gin": "include 'base.gin'\nTRAIN_STEPS = 200\n",
        "configs/beside.gin": "include 'longer.gin'\n",
    }.items():
        (folder / path).write_text(text)
    # gin never forgets a name by itself: `train.train` would be ambiguous here and in the tests that follow.
    ours = registered("diffusion_t5x.")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    gin.clear_config()
    registered("toy_verbs.")
    for selector, configurable in ours.items():
        config.gin_config._REGISTRY[selector] = configurable


def registered(package):
    """Removes a package's configurables from gin's registry and returns them."""
    registry = config.gin_config._REGISTRY
    return {name: registry.pop(name) for name, _ in list(registry.items()) if name.startswith(package)}


def verb(folder, *arguments, cwd=None):
    """Runs the toy verb in a process of its own."""
    command = [sys.executable, "-m", "toy_verbs.train", *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{folder}:{config.PACKAGE.parent}"}
    return subprocess.run(command, cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=60)


def error_of(folder, *arguments):
    """The one line that a mistake prints: no traceback, nothing done, status 2."""
    result = verb(folder, *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert "In call to configurable" not in result.stderr
    return result.stderr.removeprefix("error: ").strip()


def bound(toy, *bindings, files=("base.gin",)):
    """The values that gin binds to the toy verb's arguments, macros resolved."""
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
    assert "dry_run=True" in verb(toy, "--gin_file=base.gin", *SET, "--dry_run").stdout


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


def test_shipped_files_are_suggested(tmp_path, monkeypatch):
    (tmp_path / "gin/models").mkdir(parents=True)
    (tmp_path / "gin/runs").mkdir()
    (tmp_path / "gin/models/small.gin").write_text("MODEL = @models.Model()\n")
    (tmp_path / "gin/runs/pretrain.gin").write_text("MODEL_DIR = %gin.REQUIRED\nMODEL = %gin.REQUIRED\nSTEPS = 1\n")
    (tmp_path / "gin/runs/infer.gin").write_text("")
    monkeypatch.setattr(gin_reading, "SHIPPED", tmp_path / "gin")
    assert gin_messages._shipped_values("MODEL") == "; MODEL is set in models/small.gin"
    assert gin_messages._shipped_values("MODEL_DIR") == ""


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
