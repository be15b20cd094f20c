"""Random small models of `transformers`, in a process of their own: torch and TensorFlow do not get on in one.

python theirs.py write DIR          each of MODELS, float32 and bfloat16, with tokens and its logits for them
python theirs.py logits DIR         tokens and logits of the model in a folder, shorter ones
python theirs.py same A B A B ...   whether each two folders load as the same model
"""

import pathlib
import sys

import ml_dtypes
import numpy as np
import open_models

IDS = 300  # of the tokenizers
LENGTHS = (512, 391, 40)
EMBEDDINGS = ("model.embed_tokens.weight", "shared.weight", "transformer.wte.weight")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
SMALL = {
    "vocab_size": IDS + 20,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
SMALL_MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 24}
SMALL_T5 = {
    "vocab_size": IDS + 20,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 1,
}
SMALL_GPT2 = {"vocab_size": IDS + 20, "n_embd": 48, "n_inner": 40, "n_layer": 3, "n_head": 4, "n_positions": 1024}

# Class of the config, what differs from the defaults, and what config.json is given on top. `None` takes a key away.
MODELS = {
    "qwen3": ("Qwen3", SMALL | {"head_dim": 16, "tie_word_embeddings": True}, {}),
    "qwen2": ("Qwen2", SMALL, {}),
    "qwen3_moe": ("Qwen3Moe", SMALL | SMALL_MOE | {"head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [0]}, {}),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4, "sliding_window": 32}, {}),
    "gemma": ("Gemma", SMALL | {"head_dim": 16}, {}),
    "gemma2": ("Gemma2", SMALL | GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}, {}),
    "gemma3": ("Gemma3", SMALL | GEMMA | {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}, {}),
    "gemma3_old": (
        "Gemma3",
        SMALL | GEMMA,
        {
            "rope_parameters": None,
            "layer_types": None,
            "_sliding_window_pattern": None,
            "sliding_window_pattern": 2,
            "rope_theta": 50_000.0,
            "rope_local_base_freq": 5_000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gemma2_scaled": (
        "Gemma2",
        SMALL | GEMMA,
        {"rope_parameters": None, "rope_theta": 10_000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "gemma3_scaled": ("Gemma3", SMALL | GEMMA | {"attn_logit_softcapping": 5.0}, {"rope_scaling": LLAMA3}),
    "mistral": ("Mistral", SMALL | {"sliding_window": 32}, {}),
    "qwen2_windows": (
        "Qwen2",
        SMALL | {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        {"rope_parameters": None, "rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "qwen3_windows": (
        "Qwen3",
        SMALL
        | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 24}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {},
    ),
    "llama3": ("Llama", SMALL | {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}, {}),
    "llama2": (
        "Llama",
        SMALL | {"num_key_value_heads": 4, "vocab_size": IDS, "tie_word_embeddings": True},
        {"rope_parameters": None, "rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "smollm3": ("SmolLM3", SMALL | ENDS | {"no_rope_layers": [1, 0, 1]}, {}),
    "olmo2": ("Olmo2", SMALL | ENDS, {}),
    "phi3": ("Phi3", SMALL | ENDS | {"sliding_window": 32}, {}),
    "granite": (
        "Granite",
        SMALL
        | {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 0.5},
        {},
    ),
    "qwen3_yarn": (
        "Qwen3",
        SMALL | {"head_dim": 16},
        {
            "rope_parameters": None,
            "rope_theta": 10_000.0,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        },
    ),
    "llama_dynamic": (
        "Llama",
        SMALL,
        {"rope_parameters": None, "rope_theta": 10_000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "t5": ("T5", SMALL_T5, {"tie_word_embeddings": False, "scale_decoder_outputs": None}),
    "mt5": ("MT5", SMALL_T5, {"tie_word_embeddings": False}),
    "t5_tied": ("T5", SMALL_T5 | {"feed_forward_proj": "gated-silu"}, {}),
    "gpt2": ("GPT2", SMALL_GPT2, {}),
    "gpt2_untied": ("GPT2", SMALL_GPT2, {"tie_word_embeddings": False}),
}


def random_values(name, parameter, rng):
    """Random values of moderate size, so that logits of any wrong model are far away."""
    values = rng.standard_normal(parameter.shape)
    if parameter.ndim == 1:
        return 0.2 * values + (0 if parameter.abs().max() == 0 else 1)  # a norm is 1 where it begins, a bias 0
    if any(part in name for part in ("embed_tokens", "shared", "wte", "relative_attention_bias")):
        return 0.3 * values
    # T5 has no scale on query-key products. Sharper attention would show how a machine rounds rotary angles.
    scale = 0.3 if ".q." in name else 0.6 if ".q_proj." in name else 1.2
    return scale * values / parameter.shape[-1] ** 0.5


def by_expert(tensors, family):
    """The tensors as they lie in files: an array for each expert, where `transformers` holds all in one."""
    parts = ("gate_proj", "up_proj", "down_proj") if family != "Mixtral" else ("w1", "w3", "w2")
    found = {}
    for name, tensor in tensors.items():
        layer, joined, kind = name.partition(".experts.")
        layer = layer.replace(".mlp", ".block_sparse_moe") if family == "Mixtral" else layer
        for number, matrix in enumerate(tensor if joined else ()):
            halves = zip(parts[:2], np.split(matrix, 2), strict=True)
            for part, half in halves if kind == "gate_up_proj" else [(parts[2], matrix)]:
                found[f"{layer}.experts.{number}.{part}.weight"] = np.ascontiguousarray(half)
        if not joined:
            found[name.replace(".mlp", ".block_sparse_moe") if family == "Mixtral" else name] = tensor
    return found


def write_source(folder, name, dtype, shards):
    """A random model of `transformers` in a folder, with a tokenizer."""
    import transformers

    family, fields, changes = MODELS[name]
    text = "Text" if family == "Gemma3" else ""
    model_config = getattr(transformers, f"{family}{text}Config")(**fields)
    head = "ForConditionalGeneration" if model_config.is_encoder_decoder else "ForCausalLM"
    if family == "GPT2":
        head = "LMHeadModel"
    model = getattr(transformers, family + head)(model_config)
    rng = np.random.default_rng(0)
    tensors = {name: random_values(name, parameter, rng).astype(dtype) for name, parameter in model.named_parameters()}
    tensors = by_expert(tensors, family)
    if changes.get("tie_word_embeddings") is False:
        table = next(tensors[table] for table in EMBEDDINGS if table in tensors)
        tensors["lm_head.weight"] = (0.3 * rng.standard_normal(table.shape)).astype(dtype)
    model_config.architectures = [family + head]
    model_config.save_pretrained(folder)
    open_models.edit_config(folder, **changes)
    open_models.save_shards(folder, tensors, shards)
    ends = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    open_models.save_tokenizer(folder, open_models.byte_level(IDS), **ends)
    return tensors


def load(folder):
    import torch
    import transformers

    kind = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForSeq2SeqLM if kind.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def rows(seed, vocab_size, lengths):
    """Tokens and whether they are there `[B, L]`, padded at their ends."""
    there = np.arange(max(lengths)) < np.array(lengths)[:, None]
    tokens = np.random.default_rng(seed).integers(3, vocab_size, there.shape)
    return np.where(there, tokens, 1), there


def write_logits(folder, lengths=LENGTHS):
    import torch

    model = load(folder)
    (tokens, there), (inputs, inputs_there) = (rows(seed, model.config.vocab_size, lengths) for seed in (1, 2))
    said = {"attention_mask": there, "input_ids": tokens}
    if model.config.is_encoder_decoder:
        said = {"attention_mask": inputs_there, "input_ids": inputs, "decoder_input_ids": tokens}
    with torch.no_grad():
        logits = model(**{name: torch.tensor(value).long() for name, value in said.items()}).logits
    np.savez(folder / "logits.npz", logits=logits, tokens=tokens, there=there, inputs=inputs, inputs_there=inputs_there)


def same(one, other):
    import torch

    one, other = load(one).state_dict(), load(other).state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    if command == "write":
        for name in MODELS:
            for dtype, numpy_dtype in DTYPES.items():
                source = pathlib.Path(folders[0]) / name / dtype
                write_source(source, name, numpy_dtype, shards=3 if dtype == "float32" else 1)
                if dtype == "float32":
                    write_logits(source)
    elif command == "logits":
        write_logits(pathlib.Path(folders[0]), lengths=(100, 60, 7))
    else:
        differ = [pair for pair in zip(folders[::2], folders[1::2], strict=True) if not same(*pair)]
        sys.exit(f"not the same: {differ}" if differ else 0)
