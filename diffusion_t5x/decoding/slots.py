"""Decoding in slots ("continuous batching"): a row leaves when its text ends, and the next one takes its slot."""

import collections
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Self, TypeVar, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoded, Decoder
from diffusion_t5x.decoding.rows import Carry, RowDecoder
from diffusion_t5x.decoding.slot_programs import SlotPrograms
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.shapes import KeyScalar

Ident = TypeVar("Ident", bound=Hashable)
IsEnough = Callable[[Ident, list[int]], bool]


@dataclasses.dataclass(frozen=True)
class Progress:
    """A row that is not finished.

    Attributes:
      ident: the row's.
      tokens: the row as it is; see `Decoded.canvas`.
      num_written: number of its targets that are written.
    """

    ident: Hashable
    tokens: Int[np.ndarray, " length"]
    num_written: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """A row that has left its slot.

    Attributes:
      ident: the row's.
      decoded: the output of this one row, numpy.
    """

    ident: Hashable
    decoded: Decoded


@dataclasses.dataclass(frozen=True)
class _Request:
    """A row of `width` slots, padded to those of the engine, and the key data and the sample that it draws from."""

    ident: Hashable
    row: Batch
    width: int
    key: np.ndarray
    sample: int


class SlotEngine:
    """Decodes rows in a fixed number of slots; each text is the one that its row has alone.

    All rows are written together, piece by piece (`RowDecoder.advance`). Between two pieces, finished rows leave and
    waiting ones are read into the free slots, in the order in which they came.

    A program is compiled for each of a few numbers of rows that are read at once (all slots; 1, 4, 16, ...), one for a
    piece and one for the output.

    Args:
      mesh: the mesh for the rows.
      definition: the model.
      params: its parameters.
      decoder: writes the texts.
      num_slots: number of rows that are written at once.
      length: number of slots of a row: the maximum number of tokens of inputs and targets together.
      encoder_length: maximum number of an encoder's inputs; None for a decoder-only model.
      seed: seed of all draws; rows draw from it by `example_ids`.
      piece: number of input tokens of a row that are read at once.
      stride: number of calls of `RowDecoder.advance` between two looks at which rows have finished; None takes the
        decoder's. A larger number saves time on the host, but a finished row may wait that long.

    Raises:
      UserError: the decoder cannot write rows that do not begin together, or a number is out of range.
    """

    def __init__(
        self,
        mesh: Mesh,
        definition: ModelDefinition,
        params: Params,
        decoder: Decoder,
        *,
        num_slots: int,
        length: int,
        encoder_length: int | None = None,
        seed: int = 0,
        piece: int = 128,
        stride: int | None = None,
    ):
        row_decoder = check_slots(decoder)
        stride = row_decoder.stride if stride is None else stride
        for name, value in {"num_slots": num_slots, "length": length, "piece": piece, "stride": stride}.items():
            if value < 1:
                raise UserError(f"SlotEngine.{name} must be at least 1, not {value}.")
        if (definition.config.architecture == "encoder_decoder") != (encoder_length is not None):
            raise UserError("SlotEngine.encoder_length belongs to encoder-decoder models, and only to them.")
        partitioning.check_batch(mesh, num_slots, length)
        self._mesh, self._params, self._key = mesh, params, key_data(seed)
        self._pad_id = definition.vocabulary.pad_id
        self._length, self._encoder_length = length, encoder_length
        self._programs = SlotPrograms(mesh, definition, row_decoder, num_slots, piece, stride)
        self._forget()

    def with_params(self, params: Params, key: KeyScalar | None = None) -> Self:
        """Returns an engine without rows that has other parameters and the same compiled programs.

        Args:
          params: its parameters.
          key: the key of all draws; None: as before.
        """
        engine = copy.copy(self)
        engine._params = params
        if key is not None:
            engine._key = np.asarray(jax.random.key_data(key))
        engine._forget()
        return engine

    def _forget(self) -> None:
        """Drops all rows and their state."""
        self._slots: list[_Request | None] = [None] * self._programs.num_slots
        self._waiting: collections.deque[_Request] = collections.deque()
        self._carry: Carry | None = None

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def num_running(self) -> int:
        """Number of slots that are taken."""
        return sum(request is not None for request in self._slots)

    @property
    def num_waiting(self) -> int:
        """Number of rows that wait for a slot."""
        return len(self._waiting)

    def submit(self, ident: Hashable, row: Batch, *, seed: int | None = None, sample: int = 0) -> None:
        """Lets a row wait for a slot.

        Args:
          ident: the row's name in events; no row that waits or runs may have the same one.
          row: numpy, a batch of this one row.
          seed: seed of its draws; None takes the engine's.
          sample: number of the sample, for several texts of one example; see `sample_key`.

        Raises:
          UserError: the row is longer than those of the engine, or there is a row of that name.
        """
        if any(other is not None and other.ident == ident for other in (*self._slots, *self._waiting)):
            raise UserError(f"A row {ident!r} is already being decoded: give each row another name.")
        width = row.tokens.shape[1]
        padded = _padded(row, self._length, self._encoder_length)
        self._waiting.append(_Request(ident, padded, width, self._key if seed is None else key_data(seed), sample))

    def cancel(self, ident: Hashable) -> None:
        """Drops a row and frees its slot, if it has one. Does nothing if the row has finished."""
        self._waiting = collections.deque(request for request in self._waiting if request.ident != ident)
        for slot, request in enumerate(self._slots):
            if request is not None and request.ident == ident:
                self._slots[slot] = None
                self._stop(slot)

    def advance(self) -> list[Progress | Finished]:
        """Reads waiting rows into free slots, writes the next piece of all rows, and returns what became of each."""
        finished = self._write_pieces()
        if self._carry is None or not self.num_running:
            return []
        decoded = jax.device_get(self._programs.finish(self._carry))
        number = np.sum(decoded.written_at >= 0, axis=-1)
        return [
            Finished(request.ident, self._leave(slot, request, decoded))
            if finished[slot]
            else Progress(request.ident, decoded.canvas[slot, : request.width], int(number[slot]))
            for slot, request in enumerate(self._slots)
            if request is not None
        ]

    def decode(
        self, rows: Iterable[tuple[Ident, Batch, int]], is_enough: IsEnough[Ident] | None = None
    ) -> Iterator[tuple[Ident, Decoded]]:
        """Yields the output of each row, numpy, as soon as it is finished; takes rows as slots become free.

        Args:
          rows: name, row and number of the sample of each; see `submit`.
          is_enough: told, after each stride, the name of a row and those of its targets that are written and will not
            change; True if no more is needed. The row leaves at once; its other targets are padding. Ignored by
            decoders that do not write in order, which write all of a row.
        """
        rows = iter(rows)
        while True:
            for ident, row, sample in itertools.islice(rows, self.num_slots - self.num_running - self.num_waiting):
                self.submit(ident, row, sample=sample)
            if not self.num_waiting + self.num_running:
                return
            finished = self._write_pieces()
            early = set() if is_enough is None else self._stop_early(is_enough, finished)
            ended = [
                (slot, request)
                for slot, request in enumerate(self._slots)
                if request and (finished[slot] or slot in early)
            ]
            if ended:
                decoded = jax.device_get(self._programs.finish(self._carry))
                yield from [
                    (cast(Ident, request.ident), self._leave(slot, request, decoded, slot in early))
                    for slot, request in ended
                ]

    def _stop_early(self, is_enough: IsEnough[Ident], finished: np.ndarray) -> set[int]:
        """Stops unfinished rows of which no more is needed; returns their slots."""
        running = [(slot, request) for slot, request in enumerate(self._slots) if request and not finished[slot]]
        if not running or not self._programs.decoder.in_order:
            return set()
        decoded = self._programs.finish(self._carry)
        canvas, written_at = jax.device_get((decoded.canvas, decoded.written_at))
        enough = {
            slot
            for slot, request in running
            if is_enough(cast(Ident, request.ident), canvas[slot, written_at[slot] >= 0].tolist())
        }
        for slot in enough:
            self._stop(slot)
        return enough

    def _stop(self, slot: int) -> None:
        """Lets the row in a slot take no more steps."""
        assert self._carry is not None
        self._carry["finished"] = self._carry["finished"].at[slot].set(True)

    def _leave(self, slot: int, request: _Request, decoded: Decoded, early: bool = False) -> Decoded:
        """Frees a slot; returns the output of its row, with padding for what an early one lacks."""
        self._slots[slot] = None
        found = _row_of(decoded, slot, request.width)
        return cut_short(found, request.row, self._pad_id) if early else found

    def _write_pieces(self) -> np.ndarray:
        """Reads waiting rows into free slots and writes the next piece of all rows; returns which are finished."""
        with jax.set_mesh(self._mesh):
            self._read_waiting()
            if not self.num_running:
                return np.zeros(self.num_slots, bool)
            self._carry, finished = self._programs.advance(self._params, self._carry)
        return np.asarray(finished)

    def _read_waiting(self) -> None:
        """Gives free slots to waiting rows and reads their inputs."""
        free = [slot for slot, request in enumerate(self._slots) if request is None]
        taken = [(slot, self._waiting.popleft()) for slot in free[: self.num_waiting]]
        for slot, request in taken:
            self._slots[slot] = request
        if len(free) == self.num_slots and taken and (self._carry is None or 2 * len(taken) > self.num_slots):
            requests = [request for _, request in taken]
            requests += [_nobody(requests[0])] * (self.num_slots - len(taken))
            self._carry = self._programs.begin(self._params, *self._put(requests, partitioning.put_batch))
            return
        while taken:
            size = 4 ** int(np.log2(len(taken)) // 2)
            group, taken = taken[:size], taken[size:]
            rows = self._put([request for _, request in group], partitioning.put_whole)
            at = np.array([slot for slot, _ in group], np.int32)
            self._carry = self._programs.admit(self._params, self._carry, *rows, at)

    def _put(self, requests: list[_Request], put: Any) -> Any:
        """Puts rows, their keys and the numbers of their samples on the mesh."""
        batch = jax.tree.map(lambda *x: np.concatenate(x), *(request.row for request in requests))
        keys = np.stack([request.key for request in requests])
        samples = np.array([request.sample for request in requests], np.int32)
        return put(self._mesh, (batch, keys, samples))


def check_slots(decoder: Decoder) -> RowDecoder:
    """Returns a decoder that can run in slots; raises a UserError for others."""
    if not isinstance(decoder, RowDecoder):
        raise UserError(
            f"{type(decoder).__name__} cannot decode in slots: its rows must begin together. Decode whole batches, or "
            "take another decoder, such as decoding/autoregressive.gin or decoding/block.gin."
        )
    return decoder


@functools.lru_cache(maxsize=1024)
def key_data(seed: int) -> np.ndarray:
    """Returns the data of a seed's key."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def _padded(row: Batch, length: int, encoder_length: int | None) -> Batch:
    """Returns a batch of one row, padded to these lengths; raises a UserError if it is longer."""

    def pad(name, x):
        if x.ndim == 1:
            return np.asarray(x)
        room = (encoder_length or 0 if name.startswith("encoder") else length) - x.shape[1]
        if room < 0:
            raise UserError(f"A row has {x.shape[1]} slots, but the engine's have {x.shape[1] + room}: cut the text.")
        return np.pad(x, ((0, 0), (0, room)))

    return row.replace(**{name: pad(name, x) for name, x in vars(row).items() if x is not None})


def _nobody(request: _Request) -> _Request:
    """Returns a row without anything to write, in the shapes of another."""
    return dataclasses.replace(request, row=jax.tree.map(np.zeros_like, request.row))


def _row_of(decoded: Decoded, row: int, width: int) -> Decoded:
    """Returns the output of one row, without the slots after its own."""
    fields = {
        name: x[row : row + 1, :width] if x.ndim == 2 else x[row : row + 1]
        for name, x in vars(decoded).items()
        if x is not None and name != "steps"
    }
    return decoded.replace(**fields, steps=np.asarray(decoded.row_steps[row]))


def cut_short(decoded: Decoded, row: Batch, pad_id: int) -> Decoded:
    """Returns the output of a row that has left before its end, numpy: what is not written is padding."""
    is_written = decoded.written_at >= 0
    is_blank = row.target_mask[:, : is_written.shape[1]] & ~is_written
    return decoded.replace(
        tokens=np.where(is_blank, pad_id, decoded.tokens), num_tokens=np.sum(is_written, axis=-1, dtype=np.int32)
    )
