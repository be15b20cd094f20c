"""Recipes for imported models: their shapes are the published ones, and at a reduced size their commands run."""

import dataclasses
import gzip
import json
import pathlib
import re
import shlex

import gin
import numpy as np
import open_models
import pytest
from pages import by_module

from diffusion_t5x.command_line import config
from diffusion_t5x.convert import convert
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.importing import families
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.train import train

pytest.importorskip("seqio")

GIN = pathlib.Path(__file__).parents[2] / "gin"
QWEN3 = {  # config.json of huggingface.co/Qwen/Qwen3-0.6B
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "vocab_size": 151_936,
}
LLAMA3 = {  # config.json of huggingface.co/meta-llama/Meta-Llama-3-8B
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "vocab_size": 128_256,
}
T5 = {  # config.json of huggingface.co/google/t5-v1_1-base
    "model_type": "t5",
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32_128,
}
RECIPES = {
    "qwen3_0p6b": QWEN3,
    "qwen3_0p6b_opdlm": QWEN3,
    "llama3_8b": LLAMA3,
    "llama3_8b_opdlm": LLAMA3,
    "t5_1_1_base": T5,
}
OF_THE_RUN = {"shifted", "dtype", "remat", "scan_unroll", "dropout_rate", "vocab_size"}
OF_THE_TOKENIZER = {"reads_start"}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 310}
SMALL_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}


def recipes_model(recipe):
    config.load([f"recipes/convert/{recipe}.gin"])
    return ModelConfig(**gin.get_bindings(ModelConfig))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_is_the_published_one(recipe):
    published, model = RECIPES[recipe], recipes_model(recipe)
    family = families.FAMILIES[published["model_type"]]
    imported = family.config(Keys(published, "config.json"), published["tie_word_embeddings"])
    differing = {
        field.name
        for field in dataclasses.fields(ModelConfig)
        if getattr(model, field.name) != getattr(imported, field.name)
    }
    # Untied, no scale is 1; T5's positions set no limit, its recipe does.
    assert differing - OF_THE_RUN - OF_THE_TOKENIZER <= (
        {"logits_scale", "max_length"} if published is T5 else {"num_kv_heads"}
    )
    assert (model.readout_scale, model.kv_heads) == (imported.readout_scale, imported.kv_heads)
    assert model.vocab_size in (None, published["vocab_size"])
    assert model.reads_start == (published["model_type"] != "qwen3")  # whose tokenizer puts no BOS before a text


def test_number_of_parameters_of_llama3_8b():
    """8,030,261,248 are published; MASK comes on top, and with it rows up to a multiple of 128."""
    ids = TokenIds(size=128_257, pad_id=0, eos_id=1, mask_id=128_256, start_id=0, noise_ranges=((2, 128_256),))
    found = ModelDefinition(recipes_model("llama3_8b"), ids).num_params()
    assert found == 8_030_261_248 + 2 * 128 * 4096


def write_source(folder, recipe, test_data):
    """A random small model of a recipe's family, as it would come."""
    published = RECIPES[recipe]
    described = published | (SMALL_T5 if published is T5 else SMALL)
    keys = Keys(described, "config.json")
    family = families.FAMILIES[described["model_type"]]
    model = family.config(keys, described["tie_word_embeddings"])
    rows = described["vocab_size"]
    ids = TokenIds(size=rows, pad_id=0, eos_id=1, mask_id=rows - 1, start_id=0, noise_ranges=((2, rows - 1),))
    shapes = families.param_shapes(ModelDefinition(dataclasses.replace(model, vocab_size=rows), ids))
    rng, tensors = np.random.default_rng(0), {}
    for weight in family.weights(model):
        shape = weight.their_shape(shapes[weight.ours][1:] if weight.stacked else shapes[weight.ours])
        for name in weight.names(model.num_layers):
            tensors[name] = 0.3 * rng.standard_normal(shape, np.float32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(described))
    open_models.save_shards(folder, tensors)
    if published is T5:
        tokenizer = (test_data / "t5_sentencepiece" / "t5_vocab.model").read_bytes()
        (folder / "spiece.model").write_bytes(tokenizer)
    else:
        open_models.save_tokenizer(folder, open_models.byte_level(), eos_token="<|end|>")
    return tensors


def commands(recipe):
    """The import and training commands in the recipe's comment, without the interpreter and its flags.

    An OPDLM recipe starts from the import of the recipe that it continues.
    """
    first = in_comments(f"convert/{recipe.removesuffix('_opdlm')}")[0]
    return first, in_comments(f"convert/{recipe}")[-1]


def in_comments(recipe):
    """The commands in a recipe's comment, without the interpreter and its flags."""
    lines = (GIN / "recipes" / f"{recipe}.gin").read_text().splitlines()
    comment = by_module("\n".join(line.removeprefix("#").strip() for line in lines if line[:1] == "#"))
    return [shlex.split(command)[3:] for command in re.findall(r"python -m diffusion_t5x\.[^\n]+", comment)]


def import_and_train(recipe, folder, test_data, *more):
    """As the recipe's comment has it, at a reduced size, for four steps. Returns the tensors, import and MODEL_DIR."""
    importing, training = ([flag.replace("/tmp/", f"{folder}/") for flag in command] for command in commands(recipe))
    source, imported = importing[1], importing[3]
    tensors = write_source(folder / source, recipe, test_data)
    (folder / "my").mkdir()
    (folder / "my" / "text.txt").write_text("\n\n".join(f"Once upon {i} times there was a model." for i in range(2000)))
    prompts = [{"inputs": f"What is {i}?", "targets": str(i)} for i in range(400)]
    (folder / "my" / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    convert(importing)
    small = {"TRAIN_STEPS": 4, "EVAL_PERIOD": 4, "BATCH_SIZE": 4, "loop.Periods.log": 1}
    small |= {"TASK_FEATURE_LENGTHS": '{"inputs": 32, "targets": 32}', "HELD_OUT": '{"validation": 10.0}'}
    if recipe != "t5_1_1_base":  # its learning rate is constant
        small |= {"schedules.cosine.warmup_steps": 1}
    if recipe.endswith("opdlm"):
        small |= {"MIN_ROLLOUT_LENGTH": 16, "MAX_ROLLOUT_LENGTH": 32, "rollout.Rollout.num_batches": 2}
        small |= {"NUM_DECODED_EXAMPLES": 4, "rollout.Rollout.num_buckets": 1}
    else:
        small |= {"NUM_MICROBATCHES": 2, "EVAL_STEPS": 1}
    flags = [*training, f"--gin_file={imported}/model.gin", *more, "--gin_file=hardware/cpu.gin"]
    model_dir = flags[[flag.startswith("--gin.MODEL_DIR=") for flag in flags].index(True)].partition("=")[2]

    def run(**changed):
        settings = (small | {"ModelConfig.scan_unroll": 1, "ModelConfig.remat": '"none"'} | changed).items()
        config.run(train, [*flags, *(f"--gin.{name}={value}" for name, value in settings)])
        lines = pathlib.Path(model_dir, "train", "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    return tensors, imported, model_dir, run


@pytest.mark.slow
def test_by_lora_and_back(tmp_path, test_data, monkeypatch, capsys):
    """Trained, killed after two steps, resumed, and exported: merged."""
    monkeypatch.chdir(tmp_path)
    tensors, imported, model_dir, run = import_and_train(
        "qwen3_0p6b", tmp_path, test_data, "--gin_file=runs/lora.gin", "--gin.LORA_RANK=2"
    )
    losses = run(**{"train.train.train_steps": 2, "loop.Periods.save": 2})
    said = capsys.readouterr().err
    assert "params/ (" in said and "come from params/\\1" in said and "start fresh" in said
    losses = run()
    assert "resuming from" in capsys.readouterr().err
    assert len(losses) == 4 and np.isfinite(losses).all()
    info = pathlib.Path(model_dir, "model-info.txt").read_text()
    assert re.match(r"model: [\d,]+ parameters, [\d,]+ of them trained", info)
    assert "attention/query/down [2, 16, 2] (layers, embed, rank)" in info

    convert(["to_hf", model_dir, "--like", imported, "--as", "causal", "--output", str(tmp_path / "back")])
    back = open_models.read_shards(tmp_path / "back")
    assert back.keys() == tensors.keys()
    changed = {name: back[name] - tensors[name] for name in tensors if (back[name] != tensors[name]).any()}
    assert not any("norm" in name for name in changed) and len(changed) == 1 + 2 * 7
    for name, change in changed.items():
        if "embed_tokens" not in name:
            singular = np.linalg.svd(change, compute_uv=False)
            assert singular[2] < 1e-3 * singular[0], name  # rank 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_commands_at_a_reduced_size(recipe, tmp_path, test_data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, imported, model_dir, run = import_and_train(recipe, tmp_path, test_data)
    losses = run()
    assert len(losses) == 4 and np.isfinite(losses).all()
    said = capsys.readouterr().err
    assert f"initialised from {imported}" in said
    assert (pathlib.Path(model_dir) / "checkpoints" / "checkpoint_4").is_dir()
    if recipe.endswith("opdlm"):
        found = next(pathlib.Path(model_dir, "inference_eval").glob("*/metrics.jsonl")).read_text()
        assert 0 < json.loads(found.splitlines()[-1])["teacher_nll"] < 20


@pytest.mark.parametrize("recipe", ["gsm8k", "mbpp"])
def test_reinforcement_learning_continues_with_the_converted_model(recipe):
    assert recipes_model(f"../rl/{recipe}") == recipes_model("qwen3_0p6b")


@pytest.mark.slow
@pytest.mark.usefixtures("isolation")
@pytest.mark.parametrize("recipe", ["gsm8k", "mbpp"])
def test_reinforcement_learning_at_a_reduced_size(recipe, tmp_path, test_data, monkeypatch):
    """The command in the recipe's comment, for a rollout of two updates, from the model before its conversion."""
    monkeypatch.chdir(tmp_path)
    importing = [flag.replace("/tmp/", f"{tmp_path}/") for flag in commands("qwen3_0p6b")[0]]
    write_source(tmp_path / importing[1], "qwen3_0p6b", test_data)
    convert(importing)
    pathlib.Path("mbpp.jsonl").write_bytes(gzip.decompress((test_data / "mbpp" / "mbpp.jsonl.gz").read_bytes()))
    problems = [{"question": f"What is {n} and {n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(8)]
    for split in ("train", "test"):
        pathlib.Path(f"{split}.jsonl").write_text("\n".join(map(json.dumps, problems)))
    (flags,) = in_comments(f"rl/{recipe}")
    flags = [flag.replace("/tmp/", f"{tmp_path}/").replace("qwen3_diffusion", "qwen3") for flag in flags]
    inputs = {"gsm8k": 64, "mbpp": 512}[
        recipe
    ]  # MBPP's tests belong to a prompt, and the model has few tokens but bytes
    small = {"TRAIN_STEPS": 2, "BATCH_SIZE": 4, "GROUP_SIZE": 2, "Rollout.num_batches": 2}
    small |= {"NUM_DECODED_EXAMPLES": 2 if recipe == "mbpp" else 0}
    small |= {"MAX_ROLLOUT_LENGTH": 16, "TASK_FEATURE_LENGTHS": f'{{"inputs": {inputs}, "targets": 16}}'}
    small |= {"STATES_PER_STEP": 1, "ModelConfig.max_length": 1024, "ModelConfig.remat": '"none"'}
    settings = [f"--gin.{name}={value}" for name, value in small.items()]
    config.run(train, [*flags, f"--gin_file={tmp_path}/qwen3/model.gin", "--gin_file=hardware/cpu.gin", *settings])
    found = json.loads((tmp_path / f"rl_{recipe}" / "rollout" / "metrics.jsonl").read_text())
    assert found["reward_failures"] == 0 and 0 <= found["reward"] <= 1 and found["text_length"] > 1
    if recipe == "mbpp":
        lines = (tmp_path / "rl_mbpp" / "inference_eval" / "mbpp" / "metrics.jsonl").read_text().splitlines()
        assert [(score["step"], "pass@1" in score) for score in map(json.loads, lines)] == [(0, True), (2, True)]
