"""Answers lm-evaluation-harness's requests in token ids: the likelihood of a continuation, or a generated one.

Requests are sorted into rows of few lengths, so that few programs compile. A request's random draws depend on its own
tokens and on how often it was asked before: neither neighbours nor padding change its numbers.
"""

import collections
import dataclasses
import itertools
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.rows import LaidOut, Row, RowLayout, check_rows, fill_batches
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.in_slots import IsEnough, SlotDecoding
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.evaluation.likelihood import make_likelihood_step
from diffusion_t5x.models.masks import PREFIX
from diffusion_t5x.models.readout import score
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.progress import Progress

logger = logging.getLogger(__name__)

Tokens = list[int]
_SHORTEST = 32


@dataclasses.dataclass(frozen=True)
class Rows(LaidOut):
    """Layout of requests in rows, which should match the layout of the model's training examples.

    Attributes:
      task_feature_lengths: numbers of tokens in `inputs` (contexts) and `targets` (continuations and generated texts).
        Longer contexts lose their beginning. Without a canvas, a decoder-only model takes inputs and targets of any
        lengths that fit together.
      context_eos: contexts end in EOS, like the inputs of most tasks; False for imported models.
      canvas: a continuation is followed by EOS and padding up to the targets' length, which the model has learned to
        write.
      architecture: the model's architecture.
      batch_size: number of rows in a batch.
    """

    task_feature_lengths: Mapping[str, int]
    context_eos: bool
    canvas: bool
    architecture: Architecture = "decoder_only"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if set(self.task_feature_lengths) != {"inputs", "targets"}:
            raise UserError(
                f"TASK_FEATURE_LENGTHS must name inputs and targets, not {dict(self.task_feature_lengths)}."
            )
        check_rows(self.task_feature_lengths, self.batch_size, pack=False, canvas=self.canvas)
        if self.architecture == "encoder_decoder" and not self.context_eos:
            raise UserError("An encoder's inputs end with EOS: set CONTEXT_EOS = True.")

    @property
    def are_free(self) -> bool:
        """True if inputs and targets may have any lengths that fit together."""
        return self.architecture == "decoder_only" and not self.canvas


class Harness:
    """Answers requests with a model. Estimated likelihoods take `num_draws` draws, from the decoder's seed."""

    def __init__(
        self,
        mesh: Mesh,
        definition: ModelDefinition,
        params: Params,
        objective: Objective,
        decoder: Decoder,
        rows: Rows,
        num_draws: int = 128,
        seed: int = 0,
    ):
        self._mesh, self._params, self._rows = mesh, params, rows
        self._ids: TokenIds = definition.vocabulary
        self._likelihood = make_likelihood_step(mesh, definition, objective, num_draws=num_draws, seed=seed)
        self._decode = make_decode_step(mesh, definition, decoder, seed=seed)
        self._slots = SlotDecoding(mesh, definition, decoder, seed)
        self._greedy = _make_greedy_step(mesh, definition, objective) if objective.autoregressive else None

    def log_likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[float]:
        """Returns log-likelihoods of continuations given their contexts, in nats.

        Raises:
          UserError: a continuation is longer than the targets.
        """
        found = self._run("log-likelihoods", self._likelihood, self._scored(pairs))
        return [float(likelihood.log_likelihood) for likelihood, _ in found]

    def are_greedy(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[bool]:
        """Returns True for each continuation that equals what the model would write.

        An autoregressive model writes the most likely token each time. Any other model writes with its decoder: a
        canvas if it has one, otherwise as many tokens as the continuation has.
        """
        if self._greedy is not None:
            return [bool(found) for found, _ in self._run("greedy texts", self._greedy, self._scored(pairs))]
        canvas = self._rows.task_feature_lengths["targets"] if self._rows.canvas else None
        asked = [(tuple(context), canvas or len(continuation)) for context, continuation in pairs]
        once = list(dict.fromkeys(asked))
        written = dict(zip(once, self._write([(list(context), size) for context, size in once]), strict=True))
        return [written[key] == continuation for key, (_, continuation) in zip(asked, pairs, strict=True)]

    def write(self, requests: Sequence[tuple[Tokens, int]], is_enough: IsEnough | None = None) -> list[Tokens]:
        """Returns the decoder's output after each context, up to the end of the text, within the requested length.

        A canvas is written whole and then truncated.

        Args:
          requests: contexts, and the maximum number of tokens after each.
          is_enough: lets texts stop early; a request goes by its index.
        """
        limit = self._rows.task_feature_lengths["targets"]
        if longer := sum(size > limit for _, size in requests):
            logger.warning(
                "%d of %d texts may be longer than %d tokens; they are truncated", longer, len(requests), limit
            )
        return self._write([(context, min(size, limit)) for context, size in requests], is_enough)

    def _write(self, requests: Sequence[tuple[Tokens, int]], is_enough: IsEnough | None = None) -> list[Tokens]:
        blanks = ([] if self._rows.canvas else [self._ids.pad_id] * size for _, size in requests)
        examples = [(context, blank) for (context, _), blank in zip(requests, blanks, strict=True)]

        def step(params: Params, batch: Batch) -> jax.Array:
            return self._decode(params, batch).tokens

        found = self._run("texts", step, examples, self._slots, is_enough)
        ends = (self._ids.eos_id, self._ids.pad_id, *self._ids.end_ids)
        texts = (itertools.takewhile(lambda token: token not in ends, row[mask].tolist()) for row, mask in found)
        return [list(text)[:size] for text, (_, size) in zip(texts, requests, strict=True)]

    def _scored(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[Tokens, Tokens]]:
        end = [self._ids.eos_id] if self._rows.canvas else []
        return [(context, continuation + end) for context, continuation in pairs]

    def _run(
        self,
        what: str,
        step: Callable[[Params, Batch], Any],
        examples: Sequence[tuple[Tokens, Tokens]],
        slots: SlotDecoding | None = None,
        is_enough: IsEnough | None = None,
    ) -> list[tuple[Any, np.ndarray]]:
        """Returns each example's row of the step's output, and its target mask.

        Args:
          what: for the progress bar.
          step: reads batches.
          examples: inputs and targets.
          slots: returns decoded tokens in place of the step where that pays.
          is_enough: lets texts in slots stop early; an example goes by its index.
        """
        rows = self._rows
        layout = RowLayout(rows.task_feature_lengths, rows.architecture, rows.canvas, self._ids.pad_id)
        sequences = [
            layout.sequences({"inputs": np.array(inputs, np.int32), "targets": np.array(targets, np.int32)})
            for inputs, targets in self._fitted(examples)
        ]
        shapes = [self._shape(sequence) for sequence in sequences]
        example_ids = _example_ids(examples)
        found: list[Any] = [None] * len(examples)
        done = 0
        with Progress(len(examples), 0, what, "request", shown=not jax.process_index()) as bar:
            for shape in sorted(set(shapes), reverse=True):  # what needs most memory first
                padded = dataclasses.replace(layout, task_feature_lengths=dict(shape))
                members = ((padded.row(sequences[i]), i) for i, s in enumerate(shapes) if s == shape)
                batches = fill_batches(members, rows.batch_size, self._ids.pad_id)
                for batch, group, result in self._outputs(step, slots, is_enough, _with_ids(batches, example_ids)):
                    for row, i in enumerate(group):
                        found[i] = jax.tree.map(lambda x: x[row], result), batch.target_mask[row]  # noqa: B023
                    done += len(group)
                    bar.update(done)
        return found

    def _outputs(
        self,
        step: Callable[[Params, Batch], Any],
        slots: SlotDecoding | None,
        is_enough: IsEnough | None,
        batches: Iterator[tuple[Batch, list[int]]],
    ) -> Iterator[tuple[Batch, Sequence[int], Any]]:
        """Yields batches of one shape, each with the step's output, numpy."""
        pays, batches = (False, batches) if slots is None else slots.pays(batches, stops=is_enough is not None)
        if slots is not None and pays:
            for batch, group, (decoded,) in slots.decode(self._params, batches, is_enough=is_enough):
                yield batch, group, decoded.tokens
            return
        for batch, group in batches:
            with jax.set_mesh(self._mesh):
                yield batch, group, jax.device_get(step(self._params, partitioning.put_batch(self._mesh, batch)))

    def _fitted(self, examples: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[Tokens, Tokens]]:
        """Yields the examples truncated to the row lengths."""
        rows, lengths, cut = self._rows, self._rows.task_feature_lengths, 0
        end = [self._ids.eos_id] if rows.context_eos else []
        # Where a model reads no start token by itself, it is an empty context, as in the harness's own models.
        reads_none = self._greedy is not None and not self._ids.reads_start and not end
        start = [self._ids.start_id] if reads_none else []
        for context, targets in examples:
            room = (rows.row_length - len(targets) if rows.are_free else lengths["inputs"]) - len(end)
            if room < 0 or (not rows.are_free and len(targets) > lengths["targets"]):
                raise UserError(
                    f"A continuation of {len(targets)} tokens does not fit: raise the targets of TASK_FEATURE_LENGTHS, "
                    f"{dict(lengths)}."
                )
            cut += len(context) > room
            yield (context[max(0, len(context) - room) :] or start[:room]) + end, targets
        if cut:
            logger.warning("%d of %d contexts are too long; their beginnings are cut off", cut, len(examples))

    def _shape(self, sequences: Row) -> tuple[tuple[str, int], ...]:
        """Returns the lengths of the shortest compiled row that the sequences fit."""
        pieces, lengths = partitioning.pieces_of("length", self._mesh), self._rows.task_feature_lengths

        def shortest(longest: int, needed: int) -> int:
            while longest % (2 * pieces) == 0 and longest // 2 >= max(needed, _SHORTEST):
                longest //= 2
            return longest

        if self._rows.architecture == "decoder_only":
            return (("targets", shortest(self._rows.row_length, len(sequences["tokens"]))),)
        sizes = {"inputs": len(sequences["encoder_tokens"]), "targets": len(sequences["tokens"])}
        return tuple((name, shortest(lengths[name], size)) for name, size in sizes.items())


def _with_ids(batches: Iterator[tuple[Batch, list[int]]], example_ids: np.ndarray) -> Iterator[tuple[Batch, list[int]]]:
    """Yields the batches with the ids of their examples; empty rows have any."""
    for batch, group in batches:
        batch.example_ids[: len(group)] = example_ids[group]
        yield batch, group


def _example_ids(examples: Sequence[tuple[Tokens, Tokens]]) -> np.ndarray:
    """Returns int32 `[n]`: ids made of an example's own tokens and of how often they came before."""
    seen: collections.Counter[bytes] = collections.Counter()
    found = []
    for example in examples:
        text = repr(example).encode()
        found.append(zlib.crc32(b"%d %s" % (seen[text], text)) >> 1)
        seen[text] += 1
    return np.array(found, np.int32)


def _make_greedy_step(
    mesh: Mesh, definition: ModelDefinition, objective: Objective
) -> Callable[[Params, Batch], jax.Array]:
    """Returns the jitted `(params, batch) -> bool [B]`: True if each token of the text is the most likely one."""

    reader = Autoregressive(prefix=objective.attention == PREFIX)

    def step(params: Params, batch: Batch) -> jax.Array:
        model = definition.bind(params)
        _, is_likeliest = score(model, reader.output(model, batch).hidden, batch.tokens)
        return jnp.all(is_likeliest | ~text_of(batch, model.vocabulary), axis=-1)

    return jax.jit(step, out_shardings=partitioning.replicated(mesh))
