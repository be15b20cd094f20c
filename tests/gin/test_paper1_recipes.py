"""Paper 1's recipes (arXiv 2401.17181): the commands of docs/paper1.md, cell by cell, and the published settings."""

import gzip
import itertools
import json
import math
import pathlib
import re
import shlex

import gin
import pytest
from pages import by_module

from diffusion_t5x import benchmark, train
from diffusion_t5x import eval as evaluation
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import config

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "paper1.md"
VERBS = {"train": train.train, "eval": evaluation.evaluate, "benchmark": benchmark.decode}
TASKS = ("wmt", "squad", "mbpp")
ADAPTED = {"ar2diff_10k": 10_000, "ar2diff_100k": 100_000}
FROM_SCRATCH = ["ar", "diffusion", *(f"diffusion_{name}" for name in ("encdec", "span", "encdec_span"))]
RECIPE = "recipes/paper1"


def commands() -> dict[str, list[str]]:
    """The page's commands, verb and flags, by the folder that they write."""
    text = by_module(PAGE.read_text(encoding="utf-8"))
    found = [shlex.split(line)[2:] for line in re.findall(r"^python -m .+", text, re.MULTILINE)]
    found = [[module.rpartition(".")[2], *flags] for module, *flags in found]
    by_folder = {settings(command)[OUTPUTS[command[0]]]: command for command in found}
    assert len(by_folder) == len(found)
    return by_folder


OUTPUTS = {"train": "MODEL_DIR", "eval": "EVAL_OUTPUT_DIR", "benchmark": "BENCHMARK_OUTPUT_DIR"}


def settings(command: list[str]) -> dict[str, str]:
    return dict(re.fullmatch(r"--gin\.(\w+)=(.*)", flag).groups() for flag in command if flag.startswith("--gin."))


def files(command: list[str]) -> list[str]:
    return [flag.partition("=")[2] for flag in command if flag.startswith("--gin_file=")]


COMMANDS = commands()
FINE_TUNINGS = [folder for folder in COMMANDS if any(folder.endswith(f"_{task}") for task in TASKS)]


def scoring(fine_tuning: list[str]) -> list[str]:
    """The command that scores a fine-tuned model, as the page's rule makes it."""
    folder = settings(fine_tuning)["MODEL_DIR"]
    flags = [flag.replace("/finetune_", "/eval_") for flag in fine_tuning if flag.startswith("--gin_file=")]
    return ["eval", *flags, f"--gin.CHECKPOINT_PATH={folder}", f"--gin.EVAL_OUTPUT_DIR={folder}/scores"]


def test_every_cell_has_its_command():
    base = {f"paper1/base/{name}" for name in [*FROM_SCRATCH, *ADAPTED]}
    rows = [*FROM_SCRATCH, "ar2diff_0", *ADAPTED]
    base |= {f"paper1/base/{row}_{task}" for row, task in itertools.product(rows, TASKS)}
    base |= {f"paper1/base/{row}_{task}/scores" for row, task in itertools.product(("ar", "diffusion"), TASKS)}
    others = [(5, 8), (20, 8), (10, 4), (10, 16)]  # 10 steps and 8 samples: the scores above
    table3 = {
        f"paper1/table3/{task}_{steps}_steps_{samples}_samples"
        for task, (steps, samples) in itertools.product(("squad", "mbpp"), others)
    }
    assert COMMANDS.keys() == base | table3 | {"paper1/figure3", "paper1/figure3_mbpp"}


@pytest.mark.parametrize("folder", [folder for folder in COMMANDS if "figure3" not in folder])
def test_a_folder_is_named_after_what_its_command_makes(folder):
    command = COMMANDS[folder]
    given = settings(command)
    name = folder.removeprefix("paper1/").removesuffix("/scores")
    kind, stage, *_ = files(command)
    stage = stage.removeprefix(f"{RECIPE}/").removesuffix(".gin")
    assert kind == f"{RECIPE}/{'ar' if re.split('[/_]', name)[1] == 'ar' else 'diffusion'}.gin"
    assert ("models/encoder_decoder.gin" in files(command)) == ("_encdec" in name)
    assert (f"{RECIPE}/span_corruption.gin" in files(command)) == (stage == "pretrain" and "_span" in name)
    for place, number in {"NUM_STEPS": r"(\d+)_steps", "NUM_SAMPLES": r"(\d+)_samples"}.items():
        assert ([given[place]] if place in given else []) == re.findall(number, name)
    if stage == "adapt":
        assert int(given["TRAIN_STEPS"]) == ADAPTED[folder.rpartition("/")[2]]
    if command[0] == "train" and stage != "pretrain":
        start = given["INITIAL_CHECKPOINT_PATH"]
        pretrained = re.sub(r"_(wmt|squad|mbpp)$", "", folder)
        goes_on_from_ar = stage == "adapt" or pretrained.endswith("ar2diff_0")
        assert start == ("paper1/base/ar" if goes_on_from_ar else pretrained)
        assert start in COMMANDS
        assert stage == "adapt" or stage == f"finetune_{folder.rpartition('_')[2]}"
    if command[0] == "eval":
        assert given["CHECKPOINT_PATH"] in FINE_TUNINGS
        assert folder.startswith("paper1/table3") or command == scoring(COMMANDS[given["CHECKPOINT_PATH"]])


@pytest.mark.parametrize(("size", "embed_dim"), [("base", 768), ("large", 1024), ("xl", 2048)])
def test_every_cell_of_table_2_resolves_at_each_size(size, embed_dim, capsys):
    """The page's commands resolve with another size in place of `base`, those that score the results as well."""
    table2 = [folder for folder in FINE_TUNINGS if re.search(r"/(ar|diffusion|ar2diff_\w+)_(wmt|squad|mbpp)$", folder)]
    assert len(table2) == 15
    for command in [scoring(COMMANDS[folder]) for folder in table2] + [COMMANDS[folder] for folder in table2]:
        verb, *flags = [word.replace("base", size) for word in command]
        config.run(VERBS[verb], [*flags, "--print_config"])
        assert f"model_config.ModelConfig.embed_dim = {embed_dim}\n" in capsys.readouterr().out


def load(kind: str, *stages: str) -> None:
    config.load([f"{RECIPE}/{name}.gin" for name in (kind, *stages)])


def macro(name: str):
    return gin.query_parameter(f"%{name}")


def test_pretraining_as_published():
    for kind in ("ar", "diffusion"):
        load(kind, "pretrain")
        assert (macro("TRAIN_STEPS"), macro("BATCH_SIZE")) == (1_000_000, 128)
        assert sum(macro("TASK_FEATURE_LENGTHS").values()) == 1024
        assert macro("PRETRAINING").selector == "preprocessors.prefix_lm"
        assert [rate for _, rate in gin.query_parameter("registration.mixture.tasks")] == [0.8, 0.2]
    load("diffusion", "adapt")
    assert macro("BATCH_SIZE") == 128 and sum(macro("TASK_FEATURE_LENGTHS").values()) == 1024
    assert gin.query_parameter("sundae_objective.Sundae.num_unrolls") == 1


def test_span_corruption_fills_the_same_rows():
    preprocessors = pytest.importorskip("t5.data.preprocessors")
    load("diffusion", "pretrain", "span_corruption")
    lengths = macro("TASK_FEATURE_LENGTHS")
    assert sum(lengths.values()) == 1024

    def targets(inputs):
        return preprocessors.random_spans_helper(inputs, 0.15, 3.0, 1, 1)[1]

    assert targets(lengths["inputs"]) <= lengths["targets"]
    assert lengths["inputs"] + 1 + targets(lengths["inputs"] + 1) > 1024
    assert macro("PRETRAINING").selector == "preprocessors.span_corruption"


def test_101_languages_of_mc4():
    c4 = pytest.importorskip("tensorflow_datasets.text.c4")
    load("ar", "pretrain")
    assert len(set(macro("LANGUAGES"))) == 101
    assert set(macro("LANGUAGES")) <= set(c4.MC4_LANGUAGES)


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
@pytest.mark.parametrize(
    ("task", "steps", "period"), [("wmt", 500_000, 1000), ("squad", 250_000, 1000), ("mbpp", 5000, 50)]
)
def test_fine_tuning_as_published(kind, task, steps, period):
    load(kind, f"finetune_{task}")
    assert (macro("TRAIN_STEPS"), macro("EVAL_PERIOD"), macro("BATCH_SIZE")) == (steps, period, 128)
    assert gin.query_parameter("optimizers.adafactor.learning_rate").selector == "schedules.constant"
    assert macro("LEARNING_RATE") == 1e-3
    assert repr(gin.query_parameter("schedules.constant.value")) == "%LEARNING_RATE"
    load(kind, f"eval_{task}")
    if kind == "ar":
        assert (macro("TEMPERATURE") > 0) == (task == "mbpp")
    else:
        assert (macro("NUM_STEPS"), macro("NUM_SAMPLES")) == (10, 8)
        assert gin.query_parameter("sundae_decoding.SundaeDecoder.temperature") == 0.2


def test_figure_3_has_the_published_range_and_steps():
    load("figure3")
    assert min(macro("LENGTHS")) <= 500 and max(macro("LENGTHS")) >= 4000
    assert macro("BATCH_SIZE") == 1 and gin.query_parameter("ModelConfig.embed_dim") == 768
    for steps in (10, 20, 50):
        assert gin.query_parameter(f"steps_{steps}/sundae_decoding.SundaeDecoder.num_steps") == steps
    flag = settings(COMMANDS["paper1/figure3_mbpp"])["INPUT_LENGTH"]
    load("ar", "eval_mbpp")
    assert int(flag) == macro("TASK_FEATURE_LENGTHS")["inputs"]


TINY = {
    "VOCABULARY_FILE": "None",
    "BATCH_SIZE": "4",
    "TASK_FEATURE_LENGTHS": '{"inputs": 64, "targets": 32}',
}
SMALL = {  # by verb
    "train": TINY | {"TRAIN_STEPS": "5", "EVAL_STEPS": "1", "loop.Periods.log": "1"},
    "eval": TINY,
    "benchmark": {"LENGTHS": "(8, 16)", "INPUT_LENGTH": "8", "VOCABULARY_SIZE": "64", "MAX_BATCH_SIZE": "None"},
}


def run(folder: str, **more: str) -> None:
    """The page's command for a folder, at size tiny for 5 steps."""
    verb, *flags = COMMANDS[folder]
    if "pretrain" in flags[1] or "adapt" in flags[1]:
        more |= {"LANGUAGES": '("en", "fr")'}
    elif verb == "train":
        more |= {"NUM_DECODED_EXAMPLES": "2"}
    flags += ["--gin_file=sizes/tiny.gin", "--gin_file=hardware/cpu.gin", "--gin.ModelConfig.scan_unroll=1"]
    config.run(
        VERBS[verb],
        [flag for flag in flags if flag != "decode"]
        + [f"--gin.{name}={value}" for name, value in (SMALL[verb] | more).items()],
    )


def losses(folder: str) -> list[float]:
    lines = pathlib.Path(folder, "train", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def evaluated(folder: str) -> dict[str, float]:
    """The metrics of a folder's checkpoint, which the best one is chosen by."""
    return checkpoints.read_metadata(checkpoints.find_checkpoint(folder))["metrics"]


def results(folder: str) -> dict:
    return json.loads(pathlib.Path(folder, "results.json").read_text())


@pytest.fixture
def stand_ins(tfds_folder, monkeypatch):
    """A folder with a record of each data set, where the recipes look for it by default."""
    small_tfds = pytest.importorskip("small_tfds")
    page = {"text": "A page of words, and then some more of them. " * 8, "url": "u"}
    splits = {name: page for name in ("en", "fr", "en-validation", "fr-validation")}
    text = dict.fromkeys(page, small_tfds.TEXT)
    small_tfds.prepare(tfds_folder, "c4", "multilingual", "3.1.0", text, splits)
    pair = {"en": "A cat.", "fr": "Un chat."}
    splits = dict.fromkeys(("train", "validation", "test"), pair)
    small_tfds.prepare(tfds_folder, "wmt14_translate", "fr-en", "1.0.0", dict.fromkeys(pair, small_tfds.TEXT), splits)
    question = {"id": "1", "title": "t", "context": "It is me.", "question": "Who?"}
    question["answers"] = {"text": ["me"], "answer_start": [6]}
    splits = dict.fromkeys(("train", "validation"), question)
    small_tfds.prepare(tfds_folder, "squad", "v1.1", "3.0.0", small_tfds.SQUAD_FEATURES, splits)
    code = tfds_folder / "paper1" / "data" / "code"
    code.mkdir(parents=True)
    for name in ("train-0", "validation"):
        with gzip.open(code / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"content": "def double(x):\n    return 2 * x\n" * 8}) + "\n")
    monkeypatch.chdir(tfds_folder)


@pytest.mark.slow
def test_the_pages_commands_at_size_tiny_for_five_steps(stand_ins, capsys):
    for name in (
        "ar",
        "diffusion_encdec_span",
        "ar2diff_10k",
        "ar_wmt",
        "diffusion_encdec_span_wmt",
        "ar2diff_10k_squad",
    ):
        folder = f"paper1/base/{name}"
        start = settings(COMMANDS[folder]).get("INITIAL_CHECKPOINT_PATH")
        run(folder)
        log = capsys.readouterr().err
        assert re.search(rf"initialised from \S+/{start}/checkpoints" if start else "from scratch", log), folder
        found = losses(folder)
        assert len(found) == 5 and all(map(math.isfinite, found)), folder
        if folder in FINE_TUNINGS:
            assert macro("BEST_METRIC") in evaluated(folder)

    run("paper1/base/ar_wmt/scores")
    assert 0 <= results("paper1/base/ar_wmt/scores")["results"]["wmt14_enfr"]["bleu"] <= 100
    run("paper1/table3/squad_5_steps_8_samples", CHECKPOINT_PATH="paper1/base/ar2diff_10k_squad")
    found = results("paper1/table3/squad_5_steps_8_samples")
    assert 0 <= found["results"]["squad"]["f1"] <= 100
    assert "num_steps=5, num_samples=8" in found["evaluations"][0]

    run("paper1/figure3")
    times = json.loads(pathlib.Path("paper1/figure3/decode_time.json").read_text())["times"]
    forwards = [record["forwards"] for record in times if not record["saturating"]]
    assert forwards == [8, 10, 20, 50, 8, 9, 16, 10, 20, 50, 10, 9]  # masked: a token a step at least


@pytest.mark.slow
def test_mbpps_commands_at_size_tiny_for_five_steps(test_data, tmp_path, monkeypatch):
    (tmp_path / "paper1" / "data").mkdir(parents=True)
    problems = gzip.decompress((test_data / "mbpp" / "mbpp.jsonl.gz").read_bytes())
    (tmp_path / "paper1" / "data" / "mbpp.jsonl").write_bytes(problems)
    monkeypatch.chdir(tmp_path)
    run("paper1/base/ar_mbpp", INITIAL_CHECKPOINT_PATH="None")
    assert len(losses("paper1/base/ar_mbpp")) == 5
    assert macro("BEST_METRIC") in evaluated("paper1/base/ar_mbpp")
    run("paper1/base/ar_mbpp/scores", NUM_DECODED_EXAMPLES="2")
    assert 0 <= results("paper1/base/ar_mbpp/scores")["results"]["mbpp"]["pass@1"] <= 100
