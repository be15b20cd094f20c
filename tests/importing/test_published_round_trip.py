"""Published diffusion models in, trained, and out again: through the commands, in their own format."""

import json
import shutil

import numpy as np
import open_models
import pytest
import tokenizers
from published_diffusion import DATA, FAMILIES, mask_flags, needs_data

from diffusion_t5x import api, train
from diffusion_t5x.checkpointing import restoring
from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.checkpointing.checkpoints import open_checkpoint
from diffusion_t5x.command_line import config
from diffusion_t5x.convert import convert
from diffusion_t5x.importing import from_hf

pytest.importorskip("seqio")
pytestmark = needs_data
LEARNER = ("a2d-qwen3", "--block_size=4")  # of the shape of OPDLM's students


def import_one(folder, family, *flags):
    convert(["from_hf", str(DATA / family), "--output", str(folder), *mask_flags(family), *flags])
    return folder


def export(run, imported, *flags):
    out = run.parent / f"{run.name}_out"
    convert(["to_hf", str(run), "--like", str(imported), "--output", str(out), *flags])
    return out


def again(out):
    """The record and the parameters of an export that is imported again, to memory."""
    record, _, streams = from_hf.in_memory(str(out))
    return record, {name: stream.whole() for name, stream in streams.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].tobytes() == np.asarray(values).tobytes(), name


@pytest.mark.parametrize(("family", "flags"), [*((family, ()) for family in FAMILIES), (LEARNER[0], LEARNER[1:])])
def test_what_was_not_trained_comes_back_as_it_was(family, flags, tmp_path):
    imported = import_one(tmp_path / "here", family, *flags)
    # A folder of generation settings that the reference lacks: it is the model's own, and stays.
    (imported / "generation_config.json").write_text('{"eos_token_id": [3, 4], "top_k": 20}\n')
    out = export(imported, imported)
    assert (out / "model.safetensors").read_bytes() == (DATA / family / "model.safetensors").read_bytes()
    said, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, DATA / family))
    added = {"mask_token_id", "block_size", *(flag.lstrip("-").partition("=")[0] for flag in flags)}
    assert {key: value for key, value in said.items() if key not in added - theirs.keys()} == theirs
    assert said["mask_token_id"] == json.loads((imported / "config.json").read_text())["mask_token_id"]
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [3, 4], "top_k": 20}

    before, (record, params) = api.load(imported), again(out)
    assert_same(params, named_leaves(before.params))
    assert (record.model, record.objective, record.decoder) == (
        before.record.model,
        before.record.objective,
        before.record.decoder,
    )


@pytest.fixture
def texts(tmp_path):
    """Flags of a task of texts that count upwards, written as ids."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 256), ("validation", 32)):
        lines = []
        for first, by in zip(rng.integers(3, 50, number), rng.integers(1, 4, number), strict=True):
            row = [str(first + by * place) for place in range(20)]
            lines.append(json.dumps({"inputs": " ".join(row[:6]), "targets": " ".join(row[6:])}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    lengths = {"inputs": 8, "targets": 16}
    return [f"--gin.FILES={files}", f"--gin.TASK_FEATURE_LENGTHS={lengths}", "--gin.BATCH_SIZE=16"]


def run(imported, texts, *files, **settings):
    """Trains for 20 steps from an import; the run's folder, and the lines of its metrics."""
    folder = imported.parent / "run"
    gin_files = [f"{imported}/model.gin", *files, "tasks/local_jsonl.gin", "hardware/cpu.gin"]
    settings = {"INITIAL_CHECKPOINT_PATH": imported, "MODEL_DIR": folder, "TRAIN_STEPS": 20} | settings
    flags = [*(f"--gin_file={file}" for file in gin_files), *texts, "--gin.Periods.log=1"]
    flags += ["--gin.train.train.decode_evals=[]", *(f"--gin.{name}={value}" for name, value in settings.items())]
    config.run(train.train, flags)
    return folder, [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]


def trained_params(folder):
    shapes, read = restoring.open_params(open_checkpoint(str(folder)))
    return {name: read(name) for name in shapes}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sdar", ()),
        ("dream", ()),
        ("llada", ("runs/lora.gin",)),
        ("a2d-qwen3", ("runs/lora.gin",)),
        ("llada2_moe", ()),
    ],
)
def test_what_was_trained_comes_back_bit_for_bit(family, more, texts, tmp_path):
    imported = import_one(tmp_path / "here", family)
    folder, metrics = run(imported, texts, "runs/finetune.gin", *more, LEARNING_RATE=0.03)
    first, last = (np.mean([line["accuracy"] for line in lines]) for lines in (metrics[:5], metrics[-5:]))
    assert last > first + 0.02
    before, params = api.load(folder), trained_params(folder)
    record, found = again(export(folder, imported))
    assert_same(found, params)
    assert (record.objective, record.model) == (before.record.objective, before.record.model)
    start = named_leaves(api.load(imported).params)
    changed = {name for name, values in params.items() if (values != start[name]).any()}
    assert {"embedding", "decoder/blocks/attention/query", "decoder/blocks/mlp/wo"} <= changed


@pytest.mark.slow
def test_a_student_of_opdlm_learns_on(texts, tmp_path):
    """The teacher has the student's tokenizer, whose MASK no autoregressive model has."""
    words = {str(number): number for number in range(157)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|mask|>"])
    source = tmp_path / "source"
    shutil.copytree(DATA / LEARNER[0], source)
    open_models.save_tokenizer(source, tokenizer, eos_token="155", pad_token="154", mask_token="<|mask|>")
    convert(["from_hf", str(source), "--output", str(tmp_path / "here"), LEARNER[1]])
    convert(["to_hf", str(tmp_path / "here"), "--as", "causal", "--output", str(tmp_path / "causal")])
    convert(["from_hf", str(tmp_path / "causal"), "--output", str(tmp_path / "teacher")])
    folder, metrics = run(
        tmp_path / "here", texts, "objectives/distillation.gin", "runs/distil.gin",
        TEACHER_CHECKPOINT_PATH=tmp_path / "teacher", MIN_ROLLOUT_LENGTH=16, MAX_ROLLOUT_LENGTH=16,
        LEARNING_RATE=0.01, WARMUP_STEPS=0, **{"Rollout.num_batches": 4},
    )  # fmt: skip
    first, last = (np.mean([line["divergence"] for line in lines]) for lines in (metrics[:4], metrics[-4:]))
    assert last < 0.9 * first
    record, found = again(export(folder, tmp_path / "here"))
    assert_same(found, trained_params(folder))
    assert record.modes[0].block_size == 4
