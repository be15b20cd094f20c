"""The default decoder of each mode, with the settings of the shipped gin files."""

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.drafts import DraftingDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.resizing import ResizingDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.models.modes import Mode


def default_decoder(mode: Mode) -> Decoder | None:
    """Returns the decoder for a model of this mode; None if no shipped decoder suits it."""
    candidates = [AutoregressiveDecoder(), AutoregressiveDecoder(prefix=True)]
    candidates += [MaskedDecoder(), SundaeDecoder(), ResizingDecoder()]
    if mode.block_size is not None:
        inner = (MaskedDecoder(num_steps=4), SundaeDecoder(num_steps=4, num_samples=1, temperature=0.2))
        candidates += [BlockDecoder(mode.block_size, decoder, mode.blocks_from) for decoder in inner]
        candidates += [DraftingDecoder(mode.block_size)] if mode.block_size > 1 else []
    return next((decoder for decoder in candidates if decoder.modes[0] == mode), None)
