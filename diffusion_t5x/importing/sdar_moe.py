"""SDAR's mixtures of experts (arXiv 2510.06303): Qwen3's, trained by masked diffusion in blocks."""

import dataclasses

from diffusion_t5x.importing import qwen3_moe, sdar
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore(*sdar.HARMLESS)
    return dataclasses.replace(qwen3_moe.config(keys, tied), reads_start=False)
