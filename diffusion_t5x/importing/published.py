"""The objective and decoder of an imported model whose format names them: the published diffusion models."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_t5x.checkpointing.rebuilding import rebuild
from diffusion_t5x.checkpointing.record import modes_of
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.objective import Objective

SETTINGS = "diffusion"  # the key of config.json
_SOFTMAX = 'LOSS_SOFTMAX = "all"'  # in published training, MASK is a token like any other


@dataclasses.dataclass(frozen=True)
class Published:
    """Training and decoding of a model as its authors published them.

    Attributes:
      objective: what it was trained by.
      decoder: with the published settings; None takes the default one of the objective's mode.
      gin: lines that set the same in a gin file.
      note: what its files do not say and was assumed; empty if there is nothing.
    """

    objective: Objective = Autoregressive()  # noqa: RUF009  (frozen)
    decoder: Decoder | None = None
    gin: tuple[str, ...] = ()
    note: str = ""


def recorded(said: Mapping[str, Any], where: str) -> Published:
    """Training and decoding of a model that this framework exported, from the key SETTINGS of its config.json."""
    objective, decoder = (rebuild(said.get(name), where) for name in ("objective", "decoder"))
    if not modes_of(objective) or (decoder is not None and not modes_of(decoder)):
        raise UserError(f"{where}: {SETTINGS} names no objective and decoder that are known here.")
    return Published(objective, decoder)


def masked(decoder: MaskedDecoder, name: str, note: str = "") -> Published:
    """A model of masked diffusion over the whole row; `name` is that of its file in gin/decoding/published."""
    gin = ('include "objectives/masked.gin"', f'include "decoding/published/{name}.gin"', _SOFTMAX)
    return Published(Masked(softmax="all"), decoder, gin, note)


def blocks(decoder: BlockDecoder, name: str) -> Published:
    """A model of masked diffusion in the decoder's blocks; `name` as in `masked`."""
    gin = ('include "objectives/block.gin"', f'include "decoding/published/{name}.gin"')
    size, origin = decoder.block_size, decoder.blocks_from
    macros = (f"BLOCK_SIZE = {size}", f"BLOCKS_FROM = {origin!r}")
    objective = Block(block_size=size, blocks_from=origin, softmax="all")
    return Published(objective, decoder, (*gin, *macros, _SOFTMAX))
