"""SDAR (arXiv 2510.06303): Qwen3, trained by masked diffusion in blocks."""

import dataclasses

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.importing import qwen3
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.published import Published, blocks
from diffusion_t5x.models.config import ModelConfig

# Traces of training, and how attention is computed.
HARMLESS = (
    "attn_implementation", "auto_map", "debug", "ep_size", "fuse_cross_entropy", "mask_token_id", "micro_forward",
    "skip_checkpoint", "use_deepep",
)  # fmt: skip


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore(*HARMLESS)
    return dataclasses.replace(qwen3.config(keys, tied), reads_start=False)


def published(keys: Keys) -> Published:
    """Decoding as in the repository's generate.py: what is above a confidence of 0.85, one token at least."""
    size = keys.get("block_size", 4)
    inner = MaskedDecoder(num_steps=size, counts="index", threshold=0.85, softmax="all")
    return blocks(BlockDecoder(size, inner, blocks_from="row"), "sdar")
