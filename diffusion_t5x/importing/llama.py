"""Llama 2 and 3, and the common parts of the families derived from them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_t5x.errors import UserError
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight, table, under, vector
from diffusion_t5x.models.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; `tied` is True if the embedding also computes the logits."""
    keys.require("mlp_bias", False)
    keys.require("attention_bias", False)
    fields = shared(keys)
    keys.list_of("layer_types", fields["num_layers"], "full_attention")
    return ModelConfig(tie_embeddings=tied, **fields)


def shared(keys: Keys, kv_heads: int | None = None, head_dim: int | None = None) -> dict[str, Any]:
    """Returns the ModelConfig fields that Llama's closest relatives share, except `tie_embeddings`.

    Args:
      keys: keys of the config.json.
      kv_heads, head_dim: defaults for a config.json that does not set them; None derives them from the other sizes.
    """
    fields = dimensions(keys, kv_heads, head_dim)
    fields |= {"activation": keys.require("hidden_act", "silu"), "attention_scale": fields["head_dim"] ** -0.5}
    return fields | rotary(keys, head_dim=fields["head_dim"])


def dimensions(keys: Keys, kv_heads: int | None = None, head_dim: int | None = None) -> dict[str, Any]:
    """Returns the sizes and the settings that all descendants share; arguments as in `shared`."""
    heads, embed = keys.get("num_attention_heads"), keys.get("hidden_size")
    return {
        "embed_dim": embed,
        "num_layers": keys.layers("num_hidden_layers"),
        "num_heads": heads,
        "head_dim": keys.get("head_dim", head_dim or embed // heads),
        "mlp_dim": keys.get("intermediate_size"),
        "num_kv_heads": keys.nullable("num_key_value_heads", kv_heads) or heads,
        "position": "rotary",
        "logits_scale": 1.0,
        "norm_epsilon": keys.get("rms_norm_eps", 1e-6),
        "max_length": keys.get("max_position_embeddings"),
    }


def qwen_windows(keys: Keys, num_layers: int) -> dict[str, Any]:
    """Returns the sliding-window layers of a Qwen2 or Qwen3, as fields of ModelConfig."""
    on = keys.get("use_sliding_window", False)
    window, first = keys.nullable("sliding_window", 4096), keys.get("max_window_layers", 28)
    kinds = layer_kinds(keys, num_layers, lambda layer: bool(on and window) and layer >= first)
    return local_layers(keys, kinds, window if on else None)


def layer_kinds(keys: Keys, num_layers: int, is_local: Callable[[int], bool]) -> list[bool]:
    """Returns True for each layer with a sliding window: by `layer_types`, otherwise by its number, from 0 on."""
    kinds = keys.list_of("layer_types", num_layers, "full_attention", "sliding_attention")
    if kinds is None:
        return [is_local(layer) for layer in range(num_layers)]
    return [kind == "sliding_attention" for kind in kinds]


def local_layers(keys: Keys, kinds: Sequence[bool], window: int | None) -> dict[str, Any]:
    """Returns the ModelConfig fields for sliding-window layers; none if there are no such layers.

    Raises:
      UserError: there are such layers and no window.
    """
    if not any(kinds):
        return {}
    if window is None:
        raise UserError(f"{keys.where}: layer_types has sliding_attention, but there is no sliding_window in use.")
    return {"local_layers": tuple(kinds), "window": window}


def rotary(keys: Keys, base: float = 10_000.0, head_dim: int | None = None) -> dict[str, Any]:
    """Returns the rotary fields of `rope_scaling` and `rope_theta` (older files) or of `rope_parameters`.

    Args:
      keys: keys of the config.json.
      base: the default if it has none.
      head_dim: D; None for a model whose query-key products are not scaled by D^-0.5, for which YaRN is refused.
    """
    keys.require("partial_rotary_factor", 1.0)
    old_base, length = keys.get("rope_theta", base), keys.get("original_max_position_embeddings", None)
    new, old = keys.inside("rope_parameters"), keys.inside("rope_scaling")
    return read_rotary(old if keys.get("rope_scaling", None) else new, old_base, keys, length, head_dim)


def read_rotary(
    said: Keys, base: float, keys: Keys, length: int | None = None, head_dim: int | None = None
) -> dict[str, Any]:
    """Returns the rotary fields of ModelConfig from one object of a config.json.

    Args:
      said: the object.
      base: the default if the object has no base.
      keys: keys of the config.json.
      length: length of rows before it was extended, if the config.json has it outside of the object.
      head_dim: see `rotary`.
    """
    said.require("partial_rotary_factor", 1.0)
    kinds = ["default", "linear", "llama3", "dynamic", *(["yarn"] if head_dim else [])]
    kind = said.require("rope_type", *kinds, default=said.get("type", "default"))
    fields: dict[str, Any] = {"rotary_base": float(said.get("rope_theta", base))}
    if kind == "dynamic":  # changes rows alone that are longer than the model's
        said.ignore("factor", "original_max_position_embeddings")
    elif kind != "default":
        fields["rotary_factor"] = float(said.get("factor"))
    if kind in ("llama3", "yarn"):
        inside = said.get("original_max_position_embeddings", keys.get("max_position_embeddings"))
        length = int(length or inside)
    if kind == "yarn":
        assert head_dim is not None and length is not None
        fields |= _yarn(said, fields["rotary_base"], fields["rotary_factor"], length, head_dim)
    if kind == "llama3":
        fields["rotary_stretched"] = (length / said.get("high_freq_factor"), length / said.get("low_freq_factor"))
    said.check_all_read()
    return fields


def _yarn(said: Keys, base: float, factor: float, length: int, head_dim: int) -> dict[str, Any]:
    """The fields of ModelConfig for YaRN (arXiv 2309.00071); its factor on cosines and sines is one on products."""

    def attention_factor(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    def pair(rotations: float) -> float:  # the pair of dimensions that rotates this often in `length` tokens
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair(said.get("beta_fast", 32)), pair(said.get("beta_slow", 1))
    if said.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    mscales = said.get("mscale", 0), said.get("mscale_all_dim", 0)
    scale = attention_factor(mscales[0]) / attention_factor(mscales[1]) if all(mscales) else attention_factor(1)
    scale = said.get("attention_factor", scale)
    ramp = (float(first), float(last) if last != first else last + 0.001)
    return {"rotary_ramp": ramp, "attention_scale": head_dim**-0.5 * scale**2}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns all weights; with an output matrix only if the embedding is not tied."""
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
