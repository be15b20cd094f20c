"""A certificate of decoding: the same texts alone, in batches, in slots, on another mesh and without a cache."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoded, Decoder
from diffusion_t5x.decoding.rows import RowDecoder
from diffusion_t5x.decoding.windows import WindowDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import margins
from diffusion_t5x.evaluation.in_slots import SlotDecoding
from diffusion_t5x.evaluation.margins import Difference, Margin, Text
from diffusion_t5x.evaluation.model_views import Nudge, Nudged, View, WholeRows
from diffusion_t5x.models.streams import sample_key
from diffusion_t5x.models.transformer import ModelDefinition, Params, Transformer
from diffusion_t5x.partitioning import MeshConfig

BOUNDS: Mapping[str, float] = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Nats by which rounding may move a log probability, by the number type of the model's activations."""
MORE_PADDING = 32  # slots

Verdict = Literal["same", "rounding", "fault", "expected", "not possible"]


@dataclasses.dataclass(frozen=True)
class Differing:
    """A text that differs from its reference.

    Attributes:
      text: number of the prompt, from 0.
      reference, other: tokens of both texts.
      first: where they part; None if that cannot be told.
      margin: how narrowly the reference decided there; None if that cannot be told.
    """

    text: int
    reference: tuple[int, ...]
    other: tuple[int, ...]
    first: Difference | None
    margin: Margin | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Texts decoded in one way, beside those of each prompt alone.

    Attributes:
      dtype: number type of the activations for the texts alone, and for the others unless `way` names another.
      way: how they were decoded.
      num_texts: number of texts; 0 if the way is not possible.
      differing: the texts that differ.
      gap: largest difference of the log probability of a token that both wrote before a difference, in nats; None if
        not known.
      bound: nats up to which a difference is rounding; None if the ways are not expected to agree.
      reason: why the way is not possible; None if it is.
    """

    dtype: str
    way: str
    num_texts: int = 0
    differing: tuple[Differing, ...] = ()
    gap: float | None = None
    bound: float | None = None
    reason: str | None = None

    @property
    def largest_margin(self) -> float | None:
        """Largest margin of a text that differs, in nats; infinite if one is not known, None if no text differs."""
        sizes = [np.inf if text.margin is None else text.margin.nats for text in self.differing]
        return max(sizes, default=None)

    @property
    def verdict(self) -> Verdict:
        if self.reason is not None:
            return "not possible"
        if self.bound is None:
            return "expected" if self.differing else "same"
        # A margin that is only known to be more than something may be a fault's.
        known = all(text.margin is not None and text.margin.is_exact for text in self.differing)
        if not known or max(self.largest_margin or 0, self.gap or 0) > self.bound:
            return "fault"
        return "rounding" if self.differing else "same"


def certify(
    definition: ModelDefinition,
    params: Params,
    decoder: Decoder,
    rows: Sequence[Batch],
    *,
    seed: int = 0,
    bound: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Comparison]:
    """Decodes the same rows in every way that the machine and the decoder have, and compares the texts.

    Args:
      definition: the model; the number type of its activations comes first, then float32 and bfloat16.
      params: its parameters, float32, whole on one device.
      decoder: writes the texts.
      rows: numpy, one row for each prompt, with an example id of its own.
      seed: seed of the decoder.
      bound: nats up to which a difference is rounding; None takes `rounding_bound`.
      say: is told what is being done.

    Raises:
      UserError: there are fewer than two rows.
    """
    dtypes = list(dict.fromkeys([definition.config.dtype, "float32", "bfloat16"]))
    first, *others = [Ways(definition, params, decoder, rows, dtype, seed, bound, say) for dtype in dtypes]
    found = [comparison for ways in (first, *others) for comparison in ways.compare()]
    return found + [other.beside(first) for other in others]


class Ways:
    """The ways of decoding with activations of one number type.

    Args:
      definition, params, decoder, rows, seed, bound, say: see `certify`.
      dtype: the number type.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        params: Params,
        decoder: Decoder,
        rows: Sequence[Batch],
        dtype: Any,
        seed: int = 0,
        bound: float | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        check_prompts(len(rows))
        self.dtype, self.decoder, self.rows, self.seed, self.say = dtype, decoder, rows, seed, say
        self.definition = dataclasses.replace(definition, config=dataclasses.replace(definition.config, dtype=dtype))
        self.params = jax.jit(self.definition.as_read)(params)
        self.mesh = MeshConfig().make(jax.devices()[:1])
        self.bound = rounding_bound(dtype) if bound is None else bound
        self._programs: dict[Any, Any] = {}

    @functools.cached_property
    def alone(self) -> list[Text]:
        """Each prompt's text, decoded alone."""
        return [self._texts(self._decode(row), row, 1)[0] for row in self.rows]

    def compare(self) -> Iterator[Comparison]:
        """Yields the comparison of each way with the texts alone."""
        ways: list[tuple[str, Callable[[], list[Text] | str]]] = [
            (f"in a batch of {len(self.rows)}", self.in_a_batch),
            (f"reversed, {MORE_PADDING} slots wider", self.with_padding),
            ("in slots", self.in_slots),
            ("on all devices", self.on_another_mesh),
            ("without a cache", self.without_cache),
        ]
        self.say(f"{self.dtype}: {len(self.alone)} texts alone")
        for way, decode in ways:
            self.say(f"{self.dtype}: {way}")
            texts = decode()
            if isinstance(texts, str):
                yield Comparison(self.dtype, way, reason=texts)
                continue
            is_stale = decode == self.without_cache and isinstance(self.decoder, WindowDecoder)
            yield self.compared(way, texts, None if is_stale else self.bound)

    def beside(self, other: "Ways") -> Comparison:
        """Returns the comparison of the texts alone with those of another number type, which may differ."""
        return other.compared(f"alone in {self.dtype}", self.alone, None)

    def compared(self, way: str, texts: Sequence[Text], bound: float | None) -> Comparison:
        """Returns the comparison of texts with those alone; margins are measured for those that differ."""
        differing = []
        for number, (alone, text) in enumerate(zip(self.alone, texts, strict=True)):
            if alone.tokens != text.tokens:
                first = margins.first_difference(alone, text)
                found = None if first is None else self.margin(number, first)
                differing.append(Differing(number, alone.tokens, text.tokens, first, found))
        gaps = [margins.largest_gap(alone, text) for alone, text in zip(self.alone, texts, strict=True)]
        gap = max((gap for gap in gaps if gap is not None), default=None)
        return Comparison(self.dtype, way, len(texts), tuple(differing), gap, bound)

    def margin(self, number: int, difference: Difference) -> Margin | None:
        """Measures how narrowly the text of this number, alone, was decided; see `margins.margin`."""
        row = self.rows[number]
        self.say(f"{self.dtype}: the margin of a difference in text {number + 1}")

        def decode(nudge: Nudge) -> Text:
            return self._texts(self._decode(row, Nudged, nudge), row, 1)[0]

        positions = np.asarray(row.positions[0])
        return margins.margin(self.alone[number], difference, positions, self.decoder.left_to_right, decode)

    def _program(self, view: Callable[..., View] | None) -> Any:
        """Returns the jitted `(params, batch, *arguments of the view) -> Decoded`."""
        if view not in self._programs:

            def decode(params: Params, batch: Batch, *arguments: Any) -> Decoded:
                model: Any = self.definition.bind(params)
                model = model if view is None else view(model, *arguments)
                return self.decoder.decode(model, batch, sample_key(jax.random.key(self.seed), 0), trace=True)

            self._programs[view] = jax.jit(decode)
        return self._programs[view]

    def _decode(
        self,
        batch: Batch,
        view: Callable[..., View] | None = None,
        *arguments: Any,
        mesh: Mesh | None = None,
    ) -> Decoded:
        """Returns a batch's output with its trace, numpy."""
        mesh, params = self.mesh if mesh is None else mesh, self.params
        program = self._program(view)
        with jax.set_mesh(mesh):
            if mesh != self.mesh:
                shardings = partitioning.param_shardings(mesh, params, self.definition.axes())
                params = jax.device_put(params, shardings)
            decoded = program(params, partitioning.put_batch(mesh, batch), *arguments)
            return jax.device_get(decoded)

    def _texts(self, decoded: Decoded, batch: Batch, number: int) -> list[Text]:
        """Returns the texts of the first rows of a batch."""
        return [Text.of(self.decoder, decoded, row, batch) for row in range(number)]

    def in_a_batch(self) -> list[Text]:
        """The texts of one batch of all rows."""
        batch = stack(self.rows)
        return self._texts(self._decode(batch), batch, len(self.rows))

    def with_padding(self) -> list[Text]:
        """The texts of a batch in reverse order, so with other neighbours, and with more padding."""
        batch = stack(self.rows[::-1], MORE_PADDING)
        return self._texts(self._decode(batch), batch, len(self.rows))[::-1]

    def in_slots(self) -> list[Text] | str:
        """The texts in about half as many slots as there are rows, or why there are none."""
        if not isinstance(self.decoder, RowDecoder):
            return f"{type(self.decoder).__name__} does not decode in slots: its rows must begin together"
        num_slots = max(2, len(self.rows) // 2)
        number = -(-max(len(self.rows), num_slots + 1) // num_slots) * num_slots  # some rows come twice
        batch = stack(list(itertools.islice(itertools.cycle(self.rows), number)))
        cut = [jax.tree.map(lambda x: x[first : first + num_slots], batch) for first in range(0, number, num_slots)]  # noqa: B023
        slots = SlotDecoding(self.mesh, self.definition, self.decoder, self.seed)
        texts = [
            text
            for rows, _, (decoded,) in slots.decode(self.params, [(rows, ()) for rows in cut])
            for text in self._texts(decoded, rows, num_slots)
        ]
        return texts[: len(self.rows)]

    def another_mesh(self) -> Mesh:
        """Returns a mesh of all devices with rows and parameters spread, or rows alone where widths do not divide."""
        number = len(jax.devices())
        mesh = MeshConfig(fsdp=number).make()
        try:
            partitioning.param_shardings(mesh, self.params, self.definition.axes())
        except UserError:
            return MeshConfig(data=number).make()
        return mesh

    def on_another_mesh(self) -> list[Text] | str:
        """The texts of a batch on `another_mesh`, or why there are none."""
        devices = jax.devices()
        if len(devices) == 1:
            return f"this machine has one device ({devices[0].device_kind})"
        number = -(-len(self.rows) // len(devices)) * len(devices)
        batch = stack(list(itertools.islice(itertools.cycle(self.rows), number)))  # some rows come twice
        return self._texts(self._decode(batch, mesh=self.another_mesh()), batch, len(self.rows))

    def without_cache(self) -> list[Text] | str:
        """The texts alone by passes over whole rows, or why there are none."""
        views: list[WholeRows] = []

        def whole_rows(model: Transformer) -> WholeRows:
            views.append(WholeRows(model))
            return views[-1]

        texts = [self._texts(self._decode(row, whole_rows), row, 1)[0] for row in self.rows]
        if not any(view.num_extended for view in views):
            return f"{type(self.decoder).__name__} has one way to read: it keeps no cache"
        return texts


def check_prompts(number: int) -> None:
    """Raises a UserError if there are fewer prompts than a certificate needs."""
    if number < 2:
        raise UserError(
            "A certificate needs at least two prompts, because each text is also decoded beside others: repeat "
            f"--prompt, or name a file of prompts with --prompts. Given: {number}."
        )


def rounding_bound(dtype: str) -> float:
    """Returns the nats up to which a difference is rounding, on these devices.

    Accelerators round the factors of float32 products, unless JAX_DEFAULT_MATMUL_PRECISION is "highest" or "float32".
    A CPU does if it is "bfloat16". Then the bound is that of bfloat16.
    """
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    exact = (None, "highest", "float32") if jax.default_backend() == "cpu" else ("highest", "float32")
    return BOUNDS[dtype if dtype != "float32" or precision in exact else "bfloat16"]


def stack(rows: Sequence[Batch], more: int = 0) -> Batch:
    """Returns a batch of these batches of one row, padded to the longest one and by `more` slots."""

    def pad(name: str, x: np.ndarray) -> np.ndarray:
        if x.ndim == 1:
            return x
        longest = max(getattr(row, name).shape[1] for row in rows)
        return np.pad(x, ((0, 0), (0, longest + more - x.shape[1])))

    names = [name for name, x in vars(rows[0]).items() if x is not None]
    return Batch(
        **{name: np.concatenate([pad(name, np.asarray(getattr(row, name))) for row in rows]) for name in names}
    )
