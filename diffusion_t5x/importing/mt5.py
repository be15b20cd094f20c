"""mT5 (arXiv 2010.11934): T5 1.1 with unscaled logits, whatever the config.json says about tied embeddings."""

import dataclasses

from diffusion_t5x.importing import t5
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `t5.config`."""
    return dataclasses.replace(t5.config(keys, tied, "gated-gelu"), logits_scale=1.0)
