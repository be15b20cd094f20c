"""SmolLM3: Llama, some of whose layers have no positions (arXiv 2501.18795)."""

from diffusion_t5x.importing import llama
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.require("mlp_bias", False)
    keys.require("attention_bias", False)
    keys.require("use_sliding_window", False)
    keys.ignore("sliding_window", "max_window_layers")
    fields = llama.shared(keys, kv_heads=4)
    layers = fields["num_layers"]
    keys.list_of("layer_types", layers, "full_attention")
    every = keys.get("no_rope_layer_interval", 4)
    # One number for each layer: 1 has positions, 0 has none, whatever the name says.
    rotated = keys.list_of("no_rope_layers", layers, 0, 1) or [(layer + 1) % every > 0 for layer in range(layers)]
    unrotated = tuple(not has_positions for has_positions in rotated)
    return ModelConfig(tie_embeddings=tied, unrotated_layers=unrotated if any(unrotated) else None, **fields)
