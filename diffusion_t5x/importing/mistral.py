"""Mistral 7B (arXiv 2310.06825): Llama with sliding-window layers, up to version 0.2."""

from diffusion_t5x.importing import llama
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    fields = llama.shared(keys, kv_heads=8)
    window = keys.nullable("sliding_window", 4096)
    kinds = [window is not None] * fields["num_layers"]
    return ModelConfig(tie_embeddings=tied, **fields, **llama.local_layers(keys, kinds, window))
