"""dllm's models, OPDLM's students among them (arXiv 2606.06712): a Qwen3, Qwen2 or Llama that learned diffusion.

Their files do not say which: masked diffusion over the whole row (MDLM), or in blocks (BD3LM).
"""

import dataclasses
from collections.abc import Callable

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.published import Published, blocks, masked
from diffusion_t5x.models.config import ModelConfig

DECODER = MaskedDecoder(num_steps=32, window=32, counts="linear", softmax="all")
_NOTE = (
    "config.json does not say how the model was trained: taken for masked diffusion over the whole row (MDLM). For "
    "one of blocks (BD3LM, OPDLM), give --block_size."
)


def config(base: Callable[[Keys, bool], ModelConfig], keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig of a model that was made from one of a family with the `config` of `base`."""
    keys.ignore("auto_map", "mask_token_id")
    return dataclasses.replace(base(keys, tied), reads_start=False)


def published(keys: Keys) -> Published:
    """Decoding as in dllm's chat.py: one token per step, in windows of 32 tokens or in the model's blocks."""
    size = keys.get("block_size", None)
    if size is None:
        return masked(DECODER, "mdlm", _NOTE)
    inner = MaskedDecoder(num_steps=size, counts="linear", softmax="all")
    return blocks(BlockDecoder(size, inner), "bd3lm")
