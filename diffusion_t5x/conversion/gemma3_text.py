"""Gemma 3's text models (arXiv 2503.19786): Gemma 2 with normed queries and keys, and two kinds of rotary positions."""

from typing import Any

from diffusion_t5x.conversion import gemma2, llama, qwen3
from diffusion_t5x.conversion.keys import Keys
from diffusion_t5x.conversion.weights import Weight
from diffusion_t5x.models.config import ModelConfig

EMBEDDING, HEAD, TIED, SAME = gemma2.EMBEDDING, gemma2.HEAD, gemma2.TIED, gemma2.SAME


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    every = keys.get("sliding_window_pattern", keys.get("_sliding_window_pattern", 6))
    return ModelConfig(tie_embeddings=tied, query_key_norm=True, **gemma2.shared(keys, every), **_rotary(keys))


def _rotary(keys: Keys) -> dict[str, Any]:
    if not keys.get("rope_parameters", None):
        return llama.rotary(keys, 1_000_000.0) | {"local_rotary_base": float(keys.get("rope_local_base_freq", 10_000))}
    both = keys.inside("rope_parameters")
    local = llama.read_rotary(both.inside("sliding_attention"), 10_000.0)
    fields = llama.read_rotary(both.inside("full_attention"), 1_000_000.0)
    both.check_all_read()
    return fields | {"local_rotary_base": local["rotary_base"]}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """As `llama.weights`."""
    return (*gemma2.weights(config), *qwen3.query_key_norms())
