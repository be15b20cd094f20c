"""Diffusion models on the way out: the formats, and that the published loop writes our texts with what is exported."""

import json

import jax
import numpy as np
import open_models
import pytest
import tiny
from in_numpy import sdar_text
from published_diffusion import to_write

from diffusion_t5x import api
from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.convert import convert
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import formats, output
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.drafts import Drafts
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.resizing import Resizing
from diffusion_t5x.training.lora import Lora

pytest.importorskip("seqio")
IDS, ROWS = 300, 320
SIZES = {
    "vocab_size": ROWS, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 0, "pad_token_id": 1, "torch_dtype": "float32",
}  # fmt: skip
EXPERTS = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
    "mlp_only_layers": [0],
}  # fmt: skip
BODIES = {"qwen3": {"head_dim": 16}, "qwen2": {}, "llama": {}, "qwen3_moe": {"head_dim": 16} | EXPERTS}


def random_source(folder, kind):
    """A random autoregressive model of a family, whose rows of no token never win."""
    folder.mkdir()
    config = SIZES | BODIES[kind] | {"model_type": kind, "architectures": ["AnyForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    heads, wide = SIZES["num_attention_heads"], config.get("head_dim", 12)
    embed, inner, kv = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_key_value_heads"]
    rng, tensors = np.random.default_rng(0), {}

    def add(name, *shape):
        values = rng.standard_normal(shape)
        tensors[name] = (1 + 0.2 * values if "norm" in name else values / shape[-1] ** 0.5 * 2).astype(np.float32)

    add("model.embed_tokens.weight", ROWS, embed)
    add("lm_head.weight", ROWS, embed)
    tensors["lm_head.weight"][IDS:] = 0
    add("model.norm.weight", embed)
    for layer in (f"model.layers.{number}." for number in range(SIZES["num_hidden_layers"])):
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            add(f"{layer}self_attn.{name}_proj.weight", rows * wide, embed)
            if kind == "qwen2":
                add(f"{layer}self_attn.{name}_proj.bias", rows * wide)
        add(f"{layer}self_attn.o_proj.weight", embed, heads * wide)
        parts, width = ["mlp"], inner
        if kind == "qwen3_moe" and layer != "model.layers.0.":
            add(f"{layer}mlp.gate.weight", EXPERTS["num_experts"], embed)
            parts, width = [f"mlp.experts.{n}" for n in range(EXPERTS["num_experts"])], EXPERTS["moe_intermediate_size"]
        for part in parts:
            for name in ("gate", "up"):
                add(f"{layer}{part}.{name}_proj.weight", width, embed)
            add(f"{layer}{part}.down_proj.weight", embed, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"{layer}{name}.weight", embed)
        if kind.startswith("qwen3"):
            for name in "qk":
                add(f"{layer}self_attn.{name}_norm.weight", wide)
    open_models.save_shards(folder, tensors)
    open_models.save_tokenizer(folder, open_models.byte_level(IDS), eos_token="<|end|>", pad_token="<|pad|>")
    return tensors


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The folder of each family's import, and its tensors."""
    folder, found = tmp_path_factory.mktemp("imported"), {}
    for kind in BODIES:
        tensors = random_source(folder / f"{kind}_source", kind)
        convert(["from_hf", str(folder / f"{kind}_source"), "--output", str(folder / kind)])
        found[kind] = folder / kind, tensors
    return found


def trained(folder, imported, objective, decoder=None, **fields):
    """A run's folder as a training with this objective leaves it, but for the parameters, which are as imported."""
    opened = api.load(imported)
    record = Record.of(
        opened.definition.config, opened.definition.vocabulary.describe(), objective, [decoder] if decoder else []
    )
    record = record.__class__(**{**vars(record), "model": {**record.model, **fields}})
    output.save(folder, record, {name: np.asarray(x) for name, x in named_leaves(opened.params).items()}, "")
    return opened


DYNAMIC = MaskedDecoder(num_steps=4, counts="index", threshold=0.05, softmax="all")
STATIC = MaskedDecoder(num_steps=2, counts="index", softmax="all")


@pytest.mark.parametrize(
    ("kind", "inner", "number"),
    [
        ("qwen3", DYNAMIC, 256),
        pytest.param("qwen3", STATIC, 256, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", DYNAMIC, 64, marks=pytest.mark.slow),
    ],
    ids=["dynamic", "static", "experts"],
)
def test_the_published_loop_writes_our_texts_with_what_is_exported(kind, inner, number, imported, tmp_path):
    """Prompts of unequal length; the loop is plain numpy, and reads nothing but the exported files."""
    folder, tensors = imported[kind]
    # The settings of the autoregressive model: of these, what ends a text holds for the diffusion model, too.
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1], "top_k": 20, "do_sample": true}')
    decoder = BlockDecoder(4, inner, blocks_from="row")
    opened = trained(tmp_path / "run", folder, Block(4, blocks_from="row"), decoder)
    convert(["to_hf", str(tmp_path / "run"), "--like", str(folder), "--output", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    name, model = {"qwen3": ("sdar", "SDARModel"), "qwen3_moe": ("sdar_moe", "SDARMoeModel")}[kind]
    assert (config["model_type"], config["block_size"], config["mask_token_id"]) == (name, 4, IDS)
    assert config["auto_map"]["AutoModel"] == f"modeling_{name}.{model}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 1] and generation["do_sample"] is False and "top_k" not in generation
    exported = open_models.read_shards(tmp_path / "out")
    assert exported.keys() == tensors.keys() and all((exported[name] == tensors[name]).all() for name in tensors)

    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, IDS - 4, 1 + number % 13) for number in range(number)]
    batch = to_write(prompts, 15, opened.definition.vocabulary.pad_id)
    # The loop writes whole blocks and cuts the text, so rows end where blocks do.
    there = (
        np.arange(batch.tokens.shape[1]) < np.array([-(-(len(prompt) + 12) // 4) * 4 for prompt in prompts])[:, None]
    )
    batch = batch.replace(target_mask=batch.target_mask & there, segment_ids=batch.segment_ids * there)
    definition, params = opened.definition, opened.params
    decoded = jax.jit(lambda params: decoder.decode(definition.bind(params), batch, jax.random.key(0)))(params)
    exact = {name: tensor.astype(np.float64) for name, tensor in exported.items()}
    differ = 0
    for row, number, prompt in zip(np.asarray(decoded.tokens), np.asarray(decoded.num_tokens), prompts, strict=True):
        found = row[len(prompt) : len(prompt) + number].tolist()
        differ += found[:12] != sdar_text(config, exact, prompt, 12, inner.num_steps, inner.threshold)
    assert differ == 0


CASES = [
    ("qwen3", Block(4), {}, "a2d-qwen3"),
    ("qwen3", Masked(), {}, "a2d-qwen3"),
    ("qwen2", Masked(), {}, "a2d-qwen2"),
    ("qwen2", Masked(), {"shifted": True, "reads_start": False}, "Dream"),
    ("llama", Block(8), {}, "a2d-llama"),
    ("qwen3_moe", Block(4, blocks_from="row"), {}, "sdar_moe"),
]


@pytest.mark.parametrize(("kind", "objective", "fields", "expected"), CASES)
def test_the_format_follows_from_the_record_and_comes_in_again(
    kind, objective, fields, expected, imported, tmp_path, capsys
):
    folder, tensors = imported[kind]
    before = trained(tmp_path / "run", folder, objective, **fields)
    convert(["to_hf", str(tmp_path / "run"), "--like", str(folder), "--output", str(tmp_path / "out")])
    exported = open_models.read_shards(tmp_path / "out")
    assert exported.keys() == tensors.keys() and all((exported[name] == tensors[name]).all() for name in tensors)
    assert "LOSS_SOFTMAX" in capsys.readouterr().out  # MASK was not in the loss
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`model_type` {expected}" in card and type(objective).__name__ in card and "from_hf" in card

    convert(["from_hf", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    again = api.load(tmp_path / "again")
    assert again.definition.vocabulary.mask_id == IDS
    assert again.objective.modes == objective.modes
    for name, leaf in named_leaves(before.params).items():
        np.testing.assert_array_equal(named_leaves(again.params)[name], leaf)
    # MASK is a token of the tokenizer at its id, and no text has it.
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|mask|>"] == [IDS]


def test_llama_in_lladas_names(imported, tmp_path):
    folder, tensors = imported["llama"]
    trained(tmp_path / "run", folder, Masked())
    convert(["to_hf", str(tmp_path / "run"), "--like", str(folder), "--as", "llada", "--dtype", "BF16",
             "--output", str(tmp_path / "out")])  # fmt: skip
    exported = open_models.read_shards(tmp_path / "out")
    gate = exported["model.transformer.blocks.1.ff_proj.weight"]
    assert gate.dtype == "bfloat16"
    np.testing.assert_array_equal(gate, tensors["model.layers.1.mlp.gate_proj.weight"].astype(gate.dtype))
    convert(["from_hf", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert api.load(tmp_path / "again").definition.config.num_kv_heads == 2


def test_the_autoregressive_twin(imported, tmp_path):
    folder, tensors = imported["qwen3"]
    trained(tmp_path / "run", folder, Block(4, blocks_from="row"))
    flags = ["--like", str(folder), "--as", "causal", "--output", str(tmp_path / "out")]
    convert(["to_hf", str(tmp_path / "run"), *flags])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"
    assert not (tmp_path / "out" / "README.md").exists()
    assert (open_models.read_shards(tmp_path / "out")["lm_head.weight"] == tensors["lm_head.weight"]).all()


@pytest.mark.parametrize(
    ("kind", "objective", "fields", "form", "message"),
    [
        (
            "qwen3",
            Block(4),
            {},
            "sdar",
            "cannot be written as sdar: it holds models of masked tokens in blocks",
        ),
        ("qwen3", Block(4), {"shifted": True}, "sdar", "it holds models of masked tokens in blocks"),
        ("qwen3", Masked(), {}, "Dream", "its layers are qwen2's, and this model was imported as qwen3"),
        ("qwen2", Masked(), {"shifted": True, "reads_start": True}, "Dream", "read no start token before a row"),
        ("qwen3", Autoregressive(), {}, "diffusion", "cannot be written as diffusion: the model is trained for no"),
    ],
)
def test_what_no_format_holds_is_refused(kind, objective, fields, form, message, imported, tmp_path):
    folder, _ = imported[kind]
    trained(tmp_path / "run", folder, objective, **fields)
    with pytest.raises(UserError, match=message):
        convert(
            ["to_hf", str(tmp_path / "run"), "--like", str(folder), "--as", form, "--output", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["auto", "diffusion", "sdar"])
def test_drafts_go_out_as_the_model_without_them_if_asked_for(form):
    definition, _ = tiny.make_model(tiny.LLAMA)
    lora = Lora(drafts_only=True).describe()
    record = Record.of(definition.config, tiny.VOCABULARY.describe(), Drafts(4), lora=lora)
    with pytest.raises(UserError, match="--as causal"):
        formats.chosen(form, record, "llama", "run")
    assert formats.chosen("causal", record, "llama", "run") == formats.CAUSAL


@pytest.mark.parametrize("objective", [Masked(), Resizing()])
def test_a_model_that_also_resizes_holes_is_written_as_one_of_masks(objective):
    record = Record.of(tiny.RELATIVE, {}, objective)
    assert formats.chosen("auto", record, "llada", "run") == "llada"
