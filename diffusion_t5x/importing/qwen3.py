"""Qwen3 (arXiv 2505.09388): Llama with normalised queries and keys."""

from diffusion_t5x.importing import llama
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight, under, vector
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.require("attention_bias", False)
    fields = llama.shared(keys, kv_heads=32, head_dim=128)
    windows = llama.qwen_windows(keys, fields["num_layers"])
    return ModelConfig(tie_embeddings=tied, query_key_norm=True, **fields, **windows)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    return (*llama.weights(config), *query_key_norms())


def query_key_norms() -> tuple[Weight, ...]:
    return under(
        {"model.layers.{}.self_attn.": "decoder/blocks/attention/"},
        vector("q_norm.weight", "query_norm/scale"),
        vector("k_norm.weight", "key_norm/scale"),
    )
