"""Granite 3 (dense): Llama with factors on embeddings, query-key products, residuals and logits."""

from diffusion_t5x.importing import llama
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.require("mlp_bias", False)
    keys.require("attention_bias", False)
    fields = llama.shared(keys)
    yarn = fields["attention_scale"] * fields["head_dim"] ** 0.5
    factors = {
        "attention_scale": keys.get("attention_multiplier", 1.0) * yarn,
        "embedding_scale": keys.get("embedding_multiplier", 1.0),
        "logits_scale": 1 / keys.get("logits_scaling", 1.0),
        "residual_scale": keys.get("residual_multiplier", 1.0),
    }
    return ModelConfig(tie_embeddings=tied, **fields | factors)
