"""Writes small random models as GGUF files, and the same as folders in Hugging Face format, by llama.cpp's rules."""

import json
import pathlib
from typing import Any

import gguf
import numpy as np
import open_models

WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, IDS = 32, 64, 4, 2, 16, 2, 320
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SHARED = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "vocab_size": IDS, "tie_word_embeddings": True,
}  # fmt: skip
_SILU, _GELU = {"hidden_act": "silu"}, {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": HEAD_DIM}
# GGUF's architecture, config.json beside _SHARED, and GGUF's keys beside those of sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"model_type": "llama", "rope_theta": 100_000.0, "tie_word_embeddings": False} | _SILU,
              {"rope.freq_base": 100_000.0}),
    "llama3": ("llama", {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3}
               | _SILU, {"rope.freq_base": 5e5}),
    "llama_linear": ("llama", {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}} | _SILU,
                     {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "qwen2": ("qwen2", {"model_type": "qwen2", "rope_theta": 1e6} | _SILU, {"rope.freq_base": 1e6}),
    "qwen2_yarn": ("qwen2", {"model_type": "qwen2", "rope_theta": 1e6, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}} | _SILU,
        {"rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True,
         "rope.scaling.original_context_length": 64, "rope.scaling.yarn_beta_fast": 16.0}),
    "qwen3": ("qwen3", {"model_type": "qwen3", "rope_theta": 1e6} | _SILU, {"rope.freq_base": 1e6}),
    "gemma": ("gemma", {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}, {}),
    "gemma2": ("gemma2", {"model_type": "gemma2", "sliding_window": 24, "attn_logit_softcapping": 5.0,
                          "final_logit_softcapping": 3.0} | _GELU,
               {"attention.sliding_window": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3", {"model_type": "gemma3_text", "sliding_window": 24, "rope_theta": 1e6,
                          "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 6} | _GELU,
               {"attention.sliding_window": 24, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0}),
}  # fmt: skip
_SIZES = {
    "block_count": LAYERS, "context_length": 256, "embedding_length": WIDTH, "feed_forward_length": INNER,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM, "rope.dimension_count": HEAD_DIM, "vocab_size": IDS,
    "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
# A layer's tensors: names there and here, and shapes here.
_MATRICES = {
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, WIDTH)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, WIDTH)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, WIDTH)),
    "attn_output": ("self_attn.o_proj", (WIDTH, HEADS * HEAD_DIM)),
    "ffn_gate": ("mlp.gate_proj", (INNER, WIDTH)),
    "ffn_up": ("mlp.up_proj", (INNER, WIDTH)),
    "ffn_down": ("mlp.down_proj", (WIDTH, INNER)),
}


def _norms(family: str) -> dict[str, tuple[str, int]]:
    norms = {"attn_norm": ("input_layernorm", WIDTH), "ffn_norm": ("post_attention_layernorm", WIDTH)}
    if family in ("gemma2", "gemma3"):
        norms |= {"ffn_norm": ("pre_feedforward_layernorm", WIDTH)}
        norms |= {"post_attention_norm": ("post_attention_layernorm", WIDTH)}
        norms |= {"post_ffw_norm": ("post_feedforward_layernorm", WIDTH)}
    if family in ("qwen3", "gemma3"):
        norms |= {f"attn_{x}_norm": (f"self_attn.{x}_norm", HEAD_DIM) for x in "qk"}
    return norms


def random_tensors(family: str) -> dict[str, tuple[str, np.ndarray]]:
    """Tensors by their names in GGUF: the name and the values in Hugging Face format."""
    rng = np.random.default_rng(0)
    table = {"token_embd.weight": ("model.embed_tokens.weight", 0.3 * rng.standard_normal((IDS, WIDTH)))}
    table |= {"output_norm.weight": ("model.norm.weight", 1 + 0.2 * rng.standard_normal(WIDTH))}
    if not (_SHARED | FAMILIES[family][1])["tie_word_embeddings"]:
        table |= {"output.weight": ("lm_head.weight", 0.3 * rng.standard_normal((IDS, WIDTH)))}
    for layer in range(LAYERS):
        there, here = f"blk.{layer}.", f"model.layers.{layer}."
        for name, (ours, shape) in _MATRICES.items():
            values = rng.standard_normal(shape) / shape[1] ** 0.5
            table[f"{there}{name}.weight"] = (f"{here}{ours}.weight", values)
        for name, (ours, width) in _norms(family).items():
            table[f"{there}{name}.weight"] = (f"{here}{ours}.weight", 1 + 0.2 * rng.standard_normal(width))
        if family.startswith("qwen2"):
            for name in ("attn_q", "attn_k", "attn_v"):
                ours, shape = _MATRICES[name]
                table[f"{there}{name}.bias"] = (f"{here}{ours}.bias", 0.2 * rng.standard_normal(shape[:1]))
    return {name: (ours, values.astype(np.float32)) for name, (ours, values) in table.items()}


def as_stored(family: str, name: str, values: np.ndarray) -> np.ndarray:
    """The values as llama.cpp's converter changes them."""
    if FAMILIES[family][0] == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        heads = HEADS if "attn_q" in name else KV_HEADS
        halves = values.reshape(heads, 2, HEAD_DIM // 2, WIDTH)  # in pairs of neighbours there
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values + np.float32(1) if family.startswith("gemma") and name.endswith("norm.weight") else values


def llama3_factors() -> np.ndarray:
    """By how much Llama 3.1 stretches each wavelength, as llama.cpp's converter writes it."""
    factors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * 5e5 ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, np.float32)


def byte_level_keys(pre: str = "smollm") -> dict[str, Any]:
    """The tokenizer of `open_models.byte_level` as GGUF's keys; ids beyond its own are unused."""
    spec = json.loads(open_models.byte_level(300).to_str())
    tokens = dict(spec["model"]["vocab"]) | {token["content"]: token["id"] for token in spec["added_tokens"]}
    names = sorted(tokens, key=lambda name: tokens[name]) + [f"[PAD{i}]" for i in range(len(tokens), IDS)]
    added = {token["content"]: 3 if token["special"] else 4 for token in spec["added_tokens"]}
    return {
        "model": "gpt2", "pre": pre, "tokens": names, "merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "token_type": [added.get(name, 1) if i < len(tokens) else 5 for i, name in enumerate(names)],
        "eos_token_id": 0, "padding_token_id": 1, "add_bos_token": False,
    }  # fmt: skip


def write(
    file: pathlib.Path,
    family: str,
    tokenizer: dict[str, Any] | None = None,
    quantization: gguf.GGMLQuantizationType | None = None,
    tensors_per_file: int = 0,
    **keys: Any,
) -> None:
    """Writes a random model of a family; `keys` come beside or in place of its own, None takes one away."""
    architecture, _, own = FAMILIES[family]
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=tensors_per_file)
    tokenizer = byte_level_keys() if tokenizer is None else tokenizer
    said = {f"{architecture}.{name}": value for name, value in (_SIZES | own).items()}
    said |= {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()}
    said |= {"tokenizer.chat_template": "{{ messages[0]['content'] }}"} | keys
    for name, value in said.items():
        if value is not None:
            kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
            getattr(writer, f"add_{kinds[type(value)]}")(name, value)
    for name, (_, values) in random_tensors(family).items():
        stored = as_stored(family, name, values)
        if quantization is None or stored.ndim == 1:
            writer.add_tensor(name, stored)
        else:
            writer.add_tensor(name, gguf.quantize(stored, quantization), raw_dtype=quantization)
    if family == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(folder: pathlib.Path, family: str, rows: int = IDS) -> None:
    """The same model in Hugging Face format, with the first `rows` rows for ids."""
    folder.mkdir()
    open_models.save_tokenizer(folder, open_models.byte_level(300), eos_token="<|end|>", pad_token="<|pad|>")
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    tensors = dict(random_tensors(family).values())
    open_models.save_shards(folder, {n: tensor[:rows] if n in tables else tensor for n, tensor in tensors.items()})
    (folder / "config.json").write_text(json.dumps(_SHARED | FAMILIES[family][1] | {"vocab_size": rows}))
