"""Dream 7B (arXiv 2508.15487) and DiffuCoder: Qwen2.5, trained by masked diffusion with shifted logits."""

import dataclasses

from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.importing import qwen2
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.published import Published, masked
from diffusion_t5x.models.config import ModelConfig

DECODER = MaskedDecoder(num_steps=512, counts="times", order="entropy", softmax="filtered", temperature=0.2, top_p=0.95)


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore("auto_map", "mask_token_id")
    return dataclasses.replace(qwen2.config(keys, tied), shifted=True, reads_start=False)


def published(keys: Keys) -> Published:
    """Decoding as in the repository's README."""
    del keys
    return masked(DECODER, "dream")
