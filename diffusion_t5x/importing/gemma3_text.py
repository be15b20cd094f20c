"""Gemma 3's text models (arXiv 2503.19786): Gemma 2 with query and key norms, and two kinds of rotary positions."""

from typing import Any

from diffusion_t5x.importing import gemma2, llama, qwen3
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    every = keys.get("sliding_window_pattern", keys.get("_sliding_window_pattern", 6))
    fields = gemma2.shared(keys, every) | {"logits_softcap": keys.nullable("final_logit_softcapping", None)}
    return ModelConfig(tie_embeddings=tied, query_key_norm=True, **fields, **_rotary(keys))


def _rotary(keys: Keys) -> dict[str, Any]:
    """Returns rotary settings of global layers, and the base of local ones; only global layers may be scaled.

    As in `transformers`, `rope_scaling` overrides `rope_parameters`, and older keys supply missing bases.
    """
    keys.require("partial_rotary_factor", 1.0)
    bases = keys.get("rope_theta", 1_000_000.0), keys.get("rope_local_base_freq", 10_000.0)
    both, scaling = keys.inside("rope_parameters"), keys.inside("rope_scaling")
    full = both.inside("full_attention").updated(scaling)
    near = both.inside("sliding_attention")
    near.require("rope_type", "default", default=near.get("type", "default"))
    local = llama.read_rotary(near, bases[1], keys)
    both.check_all_read()
    return llama.read_rotary(full, bases[0], keys) | {"local_rotary_base": local["rotary_base"]}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    return (*gemma2.weights(config), *qwen3.query_key_norms())
