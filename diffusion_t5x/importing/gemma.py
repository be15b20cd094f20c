"""Gemma (arXiv 2403.08295): Llama with scaled embeddings, GELU gates and norms whose parameter is an offset from 1."""

from diffusion_t5x.importing import llama
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.require("attention_bias", False)
    keys.require("use_bidirectional_attention", False)
    for name in ("hidden_act", "hidden_activation"):  # in old files "gelu" means the approximation, too
        keys.require(name, "gelu_pytorch_tanh", "gelu")
    fields = llama.dimensions(keys, kv_heads=16, head_dim=256)
    return ModelConfig(
        tie_embeddings=tied,
        activation="gelu",
        attention_scale=fields["head_dim"] ** -0.5,
        norm_offset=True,
        embedding_scale=fields["embed_dim"] ** 0.5,
        **fields,
        **llama.rotary(keys),
    )
