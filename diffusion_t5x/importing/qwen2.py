"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on queries, keys and values."""

from diffusion_t5x.importing import llama
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight, under, vector
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    fields = llama.shared(keys, kv_heads=32)
    return ModelConfig(tie_embeddings=tied, qkv_bias=True, **fields, **llama.qwen_windows(keys, fields["num_layers"]))


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    biases = under(
        {"model.layers.{}.self_attn.": "decoder/blocks/attention/"},
        vector("q_proj.bias", "query_bias"),
        vector("k_proj.bias", "key_bias"),
        vector("v_proj.bias", "value_bias"),
    )
    return (*llama.weights(config), *biases)
