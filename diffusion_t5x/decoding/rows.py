"""Decoders that write rows piece by piece, and the state of rows between two pieces."""

from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Trace, Watch, Watched
from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import AttentionKind
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import Array, BoolBL, FloatBL, IntB, IntBL, KeyB, KeyScalar

Carry = dict[str, Any]
"""The state of some rows: a tree of arrays with an axis of rows, and of scalars that belong to no row. Among them

"batch": the rows, as they were given; "finished" `[B]`: rows that are written; "trace": see `start_trace`.
"""


@runtime_checkable
class RowDecoder(Decoder, Protocol):
    """A decoder whose rows need not begin together: they may join and leave between two calls of `advance`.

    Attributes:
      stride: number of calls after which it pays to look which rows have finished.
      in_order: targets are written from the first to the last, and no call changes those of an earlier one.
      samples_model: a written token is a draw from the model's distribution, at temperature 1 over all that may be
        written, and its position was chosen without a look at the draw.
    """

    stride: ClassVar[int] = 1
    in_order: ClassVar[bool] = True

    @property
    def samples_model(self) -> bool:
        return False

    def start(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar | KeyB,
        trace: bool | Watch = False,
        piece: int | None = None,
    ) -> Carry:
        """Returns the state of rows whose inputs are read and of whose targets nothing is written.

        Args:
          model, batch, trace: see `Decoder.decode`.
          key: random key for all draws, or one for each row.
          piece: number of input tokens read at once; None reads whole rows in one pass.
        """

    def advance(self, model: Transformer, carry: Carry) -> Carry:
        """Writes the next piece of each row that is not finished: a token, a block or a step of a canvas."""

    def finish(self, vocabulary: TokenIds, carry: Carry) -> Decoded:
        """Returns the output; of rows that are not finished, what they have so far."""

    def decode(self, model: Transformer, batch: Batch, key: KeyScalar, trace: bool | Watch = False) -> Decoded:
        carry = jax.lax.while_loop(
            lambda carry: ~jnp.all(carry["finished"]),
            lambda carry: self.advance(model, carry),
            self.start(model, batch, key, trace),
        )
        return self.finish(model.vocabulary, carry)


def start_row(
    batch: Batch, keys: KeyB, encoded: Encoded | None, canvas: IntBL, history: Trace | Watched | None
) -> Carry:
    """Returns the part of the state that all decoders have, before anything is written.

    Args:
      batch: the rows, as they were given.
      keys: a key for each row.
      encoded: an encoder's inputs.
      canvas: the rows as the decoder writes them; they may be longer than the batch's.
      history: see `start_trace`.
    """
    return {
        "batch": batch,
        "keys": keys,
        "encoded": encoded,
        "canvas": canvas,
        "written_at": jnp.full_like(canvas, -1),
        "finished": ~jnp.any(jnp.asarray(batch.target_mask), axis=-1),
        "score": jnp.zeros(len(canvas), jnp.float32),
        "steps": jnp.int32(0),
        "row_steps": jnp.zeros(len(canvas), jnp.int32),
        "trace": history,
    }


def show_rows(carry: Carry, start: IntB, tokens: IntBL, mask: BoolBL, log_probability: FloatBL) -> Carry:
    """Records one more step; the canvas gets these values from each row's start on."""
    if carry["trace"] is not None:
        canvas = carry["canvas"]
        mask, log_probability = (
            write_rows(jnp.zeros(canvas.shape, x.dtype), x, start) for x in (mask, log_probability)
        )
        shown = write_rows(canvas, tokens, start)
        carry = carry | {"trace": carry["trace"].record(carry["steps"], shown, mask, log_probability)}
    return carry | {"steps": carry["steps"] + 1}


def end_rows(carry: Carry, vocabulary: TokenIds, first: int = 0) -> Decoded:
    """Returns the output of rows whose canvas has the batch's slots from `first` on."""
    end = first + carry["batch"].tokens.shape[1]
    canvas, written_at, history = (
        jax.tree.map(lambda x: x[..., first:end], carry[name]) for name in ("canvas", "written_at", "trace")
    )
    return Decoded.of(
        canvas,
        carry["batch"],
        vocabulary,
        scores=carry["score"],
        steps=carry["steps"],
        row_steps=carry["row_steps"],
        written_at=written_at,
        trace=history and history.end(carry["steps"]),
        num_drafted=carry.get("num_drafted"),
        num_accepted=carry.get("num_accepted"),
    )


def cut(x: Shaped[Array, "batch length *rest"], start: IntB, size: int) -> Shaped[jax.Array, "batch {size} *rest"]:
    """Returns `size` slots of each row from its start on."""
    return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, size))(jnp.asarray(x), start)


def read_inputs(
    model: Transformer,
    tokens: IntBL,
    kind: AttentionKind,
    cache: KVCache,
    end: IntB,
    encoded: Encoded | None,
    piece: int | None = None,
) -> tuple[Float[jax.Array, "batch 1 embed"], KVCache]:
    """Reads each row's slots up to its end, or more of them; returns hidden states of the last one, and the cache.

    Slots from the end on are read as they are, in part or all. No query sees those before they are written anew.

    Args:
      model: reads.
      tokens: the tokens in the slots.
      kind: which slots attend to which. With blocks from the targets, a block begins at the end.
      cache: of these slots; empty.
      end: number of slots of each row that hold inputs.
      encoded: an encoder's inputs.
      piece: number of slots read at once, rounded up to whole blocks; None: all in one pass. So are attention kinds by
        which an input sees more than its block ahead.
    """
    length, last = tokens.shape[1], jnp.maximum(end - 1, 0)
    unit = {"causal": 1, "block_causal": kind.block_size}.get(kind.name)
    if piece is None or not isinstance(unit, int) or piece >= length:
        hidden, cache = model.extend(tokens, kind, cache, jnp.zeros_like(end), encoded)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1), cache
    size = min(-(-piece // unit) * unit, length)
    # Pieces begin where blocks do, the first one maybe before the row.
    origin = -(-end % unit) if kind.blocks_from == "targets" else jnp.zeros_like(end)

    def read(state):
        number, found, cache = state
        # At a row's edge a piece overlaps its neighbour: what the first one read short of its block is read again.
        start = jnp.clip(origin + number * size, 0, length - size)
        hidden, cache = model.extend(cut(tokens, start, size), kind, cache, start, encoded)
        place = jnp.clip(last - start, 0, size - 1)
        here = jnp.take_along_axis(hidden, place[:, None, None], axis=1)
        return number + 1, jnp.where((start + place == last)[:, None, None], here, found), cache

    nothing = jnp.zeros((len(tokens), 1, model.config.embed_dim), model.config.dtype)
    state = jnp.int32(0), nothing, cache
    _, found, cache = jax.lax.while_loop(lambda state: jnp.any(origin + state[0] * size < end), read, state)
    return found, cache
