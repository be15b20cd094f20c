"""Llama 2 and 3, and what the families that descend from it share with it."""

from typing import Any

from diffusion_t5x.conversion.keys import Keys
from diffusion_t5x.conversion.weights import Weight, table, under, vector
from diffusion_t5x.models.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TIED = False
SAME: dict[str, str] = {}


def config(keys: Keys, tied: bool) -> ModelConfig:
    """The model that a config.json describes; `tied` says whether the embedding reads the logits out."""
    keys.require("mlp_bias", False)
    keys.require("attention_bias", False)
    keys.require("pretraining_tp", 1)
    return ModelConfig(tie_embeddings=tied, **shared(keys))


def shared(keys: Keys) -> dict[str, Any]:
    """The fields of ModelConfig that Llama's closest relatives have in common, but for `tie_embeddings`."""
    fields = dimensions(keys)
    scale = fields["head_dim"] ** -0.5
    return fields | {"activation": keys.require("hidden_act", "silu"), "attention_scale": scale} | rotary(keys)


def dimensions(keys: Keys) -> dict[str, Any]:
    """Sizes, and what is the same in all descendants."""
    heads, embed = keys.get("num_attention_heads"), keys.get("hidden_size")
    return {
        "embed_dim": embed,
        "num_layers": keys.get("num_hidden_layers"),
        "num_heads": heads,
        "head_dim": keys.get("head_dim", embed // heads),
        "mlp_dim": keys.get("intermediate_size"),
        "num_kv_heads": keys.get("num_key_value_heads", heads),
        "position": "rotary",
        "logits_scale": 1.0,
        "norm_epsilon": keys.get("rms_norm_eps"),
        "max_length": keys.get("max_position_embeddings"),
    }


def full_attention(keys: Keys) -> None:
    """Refuses layers that see a window only."""
    keys.require("use_sliding_window", False)
    keys.ignore("sliding_window", "max_window_layers")
    keys.require_each("layer_types", "full_attention")


def rotary(keys: Keys, base: float = 10_000.0) -> dict[str, Any]:
    """From `rope_parameters`, or as older files have it from `rope_theta` and `rope_scaling`."""
    old_base = keys.get("rope_theta", base)
    new, old = keys.inside("rope_parameters"), keys.inside("rope_scaling")
    return read_rotary(new if keys.get("rope_parameters", None) else old, old_base)


def read_rotary(said: Keys, base: float) -> dict[str, Any]:
    """The fields of ModelConfig from one object of a config.json; `base` is what it is where the object has none."""
    said.require("partial_rotary_factor", 1.0)
    kind = said.require("rope_type", "default", "linear", "llama3", default=said.get("type", "default"))
    fields = {"rotary_base": float(said.get("rope_theta", base))}
    if kind != "default":
        fields["rotary_factor"] = float(said.get("factor"))
    if kind == "llama3":
        length = said.get("original_max_position_embeddings")
        fields["rotary_stretched"] = (length / said.get("high_freq_factor"), length / said.get("low_freq_factor"))
    said.check_all_read()
    return fields


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """All weights; an output matrix of its own only where the embedding is not tied."""
    block = under(
        {"model.layers.{}.": "decoder/blocks/"},
        vector("input_layernorm.weight", "attention_norm/scale"),
        Weight("self_attn.q_proj.weight", "attention/query"),
        Weight("self_attn.k_proj.weight", "attention/key"),
        Weight("self_attn.v_proj.weight", "attention/value"),
        Weight("self_attn.o_proj.weight", "attention/out", inputs=2),
        vector("post_attention_layernorm.weight", "mlp_norm/scale"),
        Weight("mlp.gate_proj.weight", "mlp/wi_0"),
        Weight("mlp.up_proj.weight", "mlp/wi_1"),
        Weight("mlp.down_proj.weight", "mlp/wo"),
    )
    head = () if config.tie_embeddings else (Weight(HEAD, "head"),)
    return (table(EMBEDDING, "embedding"), *block, vector("model.norm.weight", "decoder/final_norm/scale"), *head)
