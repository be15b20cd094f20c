"""Modes of use: modes that an objective trains and that a decoder needs."""

import dataclasses
from typing import Literal, Self

import jax

from diffusion_t5x.models.masks import CAUSAL, PREFIX, AttentionKind, BlocksFrom

Noise = Literal["mask", "uniform", "resize"]


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to predict tokens.

    Attributes:
      attention: name of an `AttentionKind`.
      block_size: number of tokens per block, if attention has blocks.
      noise: the content of unwritten targets: MASK, random tokens, or any number of MASKs for a hole's tokens; None for
        left to right, which has none.
      blocks_from: where blocks are counted from, see `AttentionKind`.
    """

    attention: str
    block_size: int | None = None
    noise: Noise | None = None
    blocks_from: BlocksFrom = "targets"

    @classmethod
    def of(cls, kind: AttentionKind, noise: Noise | None = None) -> Self:
        """Returns the mode with this attention and noise."""
        size = kind.block_size
        assert not isinstance(size, jax.Array), "traced only inside a loss"
        return cls(kind.name, size, noise, kind.blocks_from)

    def serves(self, use: Self) -> bool:
        """Returns True if a model that learned this mode can be used in the other: the same one, or fewer drafts."""
        # A draft does not see those after it, so the first ones are the same whatever their number.
        fewer = self.attention == use.attention == "block_drafts" and (use.block_size or 0) <= (self.block_size or 0)
        return use == (dataclasses.replace(self, block_size=use.block_size) if fewer else self)

    def __str__(self) -> str:
        blocks = f" in blocks of {self.block_size}" if self.block_size else ""
        if self.blocks_from == "row":
            blocks += " counted from the row's beginning"
        names = {"mask": "masked tokens", "uniform": "random tokens", "resize": "holes of unknown length"}
        tokens = names[self.noise] if self.noise else "left to right"
        return f"{tokens}{blocks}, {self.attention.replace('_', '-')} attention"


class LeftToRight:
    """An objective or a decoder that reads a model from left to right.

    Attributes:
      prefix: with bidirectional attention over the inputs.
    """

    prefix: bool

    @property
    def attention(self) -> AttentionKind:
        return PREFIX if self.prefix else CAUSAL

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention),)
