"""Imports of GPT-2 as its authors' folders have it: names without a prefix, old buffers, what is refused."""

import json

import numpy as np
import open_models
import pytest
from in_torch import load_ours

from diffusion_t5x.convert import convert
from diffusion_t5x.errors import UserError

pytest.importorskip("seqio")

EMBED, HEADS, LAYERS, LENGTH, IDS = 12, 3, 2, 64, 300
# The keys of the published config.json, and those of a medium-sized one.
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 0,
    "embd_pdrop": 0.1,
    "eos_token_id": 0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": LENGTH,
    "n_embd": EMBED,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_positions": LENGTH,
    "n_special": 0,
    "predict_special_tokens": True,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": IDS,
}


def tensors():
    norm, inner = {"weight": (EMBED,), "bias": (EMBED,)}, 4 * EMBED
    layers = {
        "ln_1": norm,
        "attn.c_attn": {"weight": (EMBED, 3 * EMBED), "bias": (3 * EMBED,)},
        "attn.c_proj": {"weight": (EMBED, EMBED), "bias": (EMBED,)},
        "ln_2": norm,
        "mlp.c_fc": {"weight": (EMBED, inner), "bias": (inner,)},
        "mlp.c_proj": {"weight": (inner, EMBED), "bias": (EMBED,)},
    }
    modules = {f"h.{i}.{name}": shapes for i in range(LAYERS) for name, shapes in layers.items()}
    modules |= {"wte": {"weight": (IDS, EMBED)}, "wpe": {"weight": (LENGTH, EMBED)}, "ln_f": norm}
    rng = np.random.default_rng(0)
    return {
        f"{module}.{name}": rng.standard_normal(shape).astype(np.float32)
        for module, shapes in modules.items()
        for name, shape in shapes.items()
    }


def write_source(folder, changes=None, prefix="", more=None):
    folder.mkdir()
    named = {f"{prefix}{name}": value for name, value in tensors().items()}
    open_models.save_shards(folder, named | (more or {}))
    (folder / "config.json").write_text(json.dumps(GPT2 | (changes or {})))
    # The published tokenizer_config.json names no tokens: config.json does.
    open_models.save_tokenizer(folder, open_models.byte_level(IDS), model_max_length=LENGTH)
    return folder


def test_files_without_a_prefix_and_with_old_buffers(tmp_path):
    mask = {f"h.{i}.attn.bias": np.tri(LENGTH, dtype=np.uint8)[None, None] for i in range(LAYERS)}
    write_source(tmp_path / "published", more=mask | {"h.0.attn.masked_bias": np.array(-1e4, np.float32)})
    write_source(tmp_path / "resaved", prefix="transformer.")
    found = {}
    for name in ("published", "resaved"):
        convert(["from_hf", str(tmp_path / name), "--output", str(tmp_path / f"{name}_out")])
        convert(["to_hf", str(tmp_path / f"{name}_out"), "--output", str(tmp_path / f"{name}_back")])
        definition, found[name] = load_ours(tmp_path / f"{name}_out")
        expected, back = (open_models.read_shards(tmp_path / f"{name}{which}") for which in ("", "_back"))
        assert back.keys() == expected.keys() - mask.keys() - {"h.0.attn.masked_bias"}
        for tensor, values in back.items():
            np.testing.assert_array_equal(values, expected[tensor])
    assert definition.vocabulary.eos_id == 0 and definition.config.max_length == LENGTH
    published, resaved = found.values()
    np.testing.assert_array_equal(published["embedding"], resaved["embedding"])
    # Columns of the one tensor, in the order of queries, keys, values, and of the heads in each.
    attention, fused = published["decoder"]["blocks"]["attention"], tensors()["h.1.attn.c_attn.weight"]
    for number, name in enumerate(("query", "key", "value")):
        for head in range(HEADS):
            start = number * EMBED + head * EMBED // HEADS
            np.testing.assert_array_equal(attention[name][1, :, head], fused[:, start : start + EMBED // HEADS])


def test_a_tokenizer_in_two_files_is_to_be_made_one(tmp_path):
    source = write_source(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    (source / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"has no tokenizer: .* There is merges\.txt: .* saves it as tokenizer\.json"):
        convert(["from_hf", str(source), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "gelu"}, r'activation_function = "gelu" is not supported, only "gelu_new" or'),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights = false is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention = true is not supported"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types: layers of several kinds"),
        ({"n_head": 0}, "n_head = 0 should be a positive whole number"),
        ({"n_head": 5}, r"c_attn\.weight has the shape \(12, 36\), .* asks for \(12, 30\)"),
        ({"n_positions": 65}, r"wpe\.weight has the shape \(64, 12\), .* asks for \(65, 12\)"),
        ({"n_inner": 47}, r"c_fc\.weight has the shape \(12, 48\), .* asks for \(12, 47\)"),
        ({"n_layer": 3}, r"lacks tensors that gpt2 has: h\.2\."),
    ],
)
def test_configs_that_are_refused(changes, message, tmp_path):
    source = write_source(tmp_path / "source", changes)
    with pytest.raises(UserError, match=message):
        convert(["from_hf", str(source), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
