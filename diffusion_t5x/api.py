"""The Python API: `load` opens a model; its methods write texts, fill holes, chat, score texts and show every step."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import jax
from jax.sharding import Mesh

from diffusion_t5x.api_chat import Chatting
from diffusion_t5x.api_decoding import Batches, Decoding, batch_size, together
from diffusion_t5x.api_opening import opened
from diffusion_t5x.api_values import LogLikelihood, Steps, as_example, as_pairs, as_texts
from diffusion_t5x.chat.prompts import Prompts, prompt_lengths
from diffusion_t5x.checkpointing.rebuilding import rebuild
from diffusion_t5x.checkpointing.record import Record, is_plain
from diffusion_t5x.data import stop_strings
from diffusion_t5x.data.templates import Template, Templates
from diffusion_t5x.data.text_rows import TextRows, room_for
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.decoder import Decoder, check_fills
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.structured import checked, language_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import traces
from diffusion_t5x.evaluation.likelihood import likelihoods, make_likelihood_step
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.streams import seed_number
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.likelihood import check_num_draws
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.agreement import Agreement


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model(Chatting):
    """A model for inference on one device. Made by `load`.

    Attributes:
      name: the path or Hub id that it was loaded from.
      record: how it was trained.
      params: nested dictionaries of arrays; matrices and embeddings in `config.dtype`.
      tokenizer: encodes texts to token ids, and decodes them.
      decoder: the default decoder; None if the record names none.
      objective: the default objective for likelihoods; None if the record names none.
      definition: the model's structure, to which parameters are bound.
      mesh: a mesh of one device.
      allow_mismatch: see `load`.
    """

    name: str
    record: Record
    params: Params
    tokenizer: AnyVocabulary
    decoder: Decoder | None
    objective: Objective | None
    definition: ModelDefinition
    mesh: Mesh
    allow_mismatch: bool = False

    def __repr__(self) -> str:
        trained = self.record.trained_by or ("imported" if self.record.imported else "unknown objective")
        return f"Model({self.name!r}, {trained}, {self.definition.num_params():,} parameters, {self.decoder})"

    @property
    def config(self) -> ModelConfig:
        """The model's dimensions."""
        return self.definition.config

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of them
        self,
        prompts: str,
        *,
        decoder: Decoder | None = ...,
        length: int | None = ...,
        samples: Literal[1] = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        regex: str | None = ...,
        json_schema: str | Mapping[str, Any] | None = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str],
        *,
        decoder: Decoder | None = ...,
        length: int | None = ...,
        samples: Literal[1] = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        regex: str | None = ...,
        json_schema: str | Mapping[str, Any] | None = ...,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        decoder: Decoder | None = ...,
        length: int | None = ...,
        samples: int,
        seed: int = ...,
        stop: Sequence[str] = ...,
        regex: str | None = ...,
        json_schema: str | Mapping[str, Any] | None = ...,
    ) -> Any: ...

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        *,
        decoder: Decoder | None = None,
        length: int | None = None,
        samples: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
        regex: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers prompts. The same seed gives the same texts as the verb `generate`.

        More than 8 are answered in 8 slots, if the decoder can: see docs/inference.md.

        Args:
          prompts: one prompt, or several.
          decoder: the decoder; None takes the model's own.
          length: maximum number of tokens to write; for diffusion, the size of the canvas. None takes the length of the
            training targets, or at most 256.
          samples: number of answers to each prompt.
          seed: random seed.
          stop: strings before which an answer ends.
          regex: answers are texts of this regular expression, whole: see docs/structured.md.
          json_schema: answers are JSON of this schema, or of the one in this file.

        Returns:
          The answer to one prompt, or a list of answers in the order of the prompts. With several samples, each answer
          is a list of texts.

        Raises:
          UserError: a prompt is too long, the model was not trained for this decoder, or no text of the expression or
            the schema fits the length.
        """
        texts = as_texts(prompts)
        if not isinstance(samples, int) or samples < 1:
            raise UserError(f"samples must be at least 1, not {samples!r}.")
        stops = stop_strings.check(stop, "stop")
        language = language_of(regex, json_schema, self.tokenizer)
        if stops and language is not None:
            raise UserError("stop would cut the text that regex or json_schema asks for: leave it out.")
        batches = list(checked(language, self._prompts(texts, length, bool(stops))))
        records = self._decode(batches, self._within(decoder, language), seed, samples=samples, stops=stops)
        found = [record["predictions"] if samples > 1 else record["prediction"] for record in records]
        return found[0] if isinstance(prompts, str) else found

    @overload
    def fill(  # type: ignore[overload-overlap]  # a str is a sequence of them
        self, texts: str, inputs: str = ..., *, decoder: Decoder | None = ..., seed: int = ..., regex: str | None = ...
    ) -> str: ...

    @overload
    def fill(
        self,
        texts: Sequence[str],
        inputs: str | Sequence[str] = ...,
        *,
        decoder: Decoder | None = ...,
        seed: int = ...,
        regex: str | None = ...,
    ) -> list[str]: ...

    def fill(
        self,
        texts: str | Sequence[str],
        inputs: str | Sequence[str] = "",
        *,
        decoder: Decoder | None = None,
        seed: int = 0,
        regex: str | None = None,
    ) -> str | list[str]:
        """Fills the holes of texts, such as "x =<hole:4> + 1": `<hole:N>` is a hole of N tokens.

        `<hole:?>` and `<hole:N?>` are holes of unknown length, for models of `objectives.resizing`.

        The texts are those that `infer --templates` writes; see docs/infilling.md.

        Args:
          texts: one text, or several; each has a hole.
          inputs: for a model that was trained with inputs: one input for all texts, or one for each.
          decoder: the decoder; None takes the model's own.
          seed: random seed.
          regex: what stands in each hole is a text of this regular expression, as long as the hole.

        Returns:
          The whole text with its holes filled, or a list of such texts.

        Raises:
          UserError: a text has no hole or is too long, inputs for a model that takes none, or a decoder that cannot
            fill holes (autoregressive decoders cannot), or no text of the expression is as long as a hole.
        """
        pairs = as_pairs(texts, inputs)
        decoder = self._use(decoder, self.decoder, "decoder")
        rows = dataclasses.replace(self._rows(pairs), batch_size=batch_size(len(pairs)))
        templates = Templates(
            [Template.of(text, given or None, f"Text {n}") for n, (text, given) in enumerate(pairs)], rows
        )
        check_fills(decoder, templates.have_unknown_lengths)
        templates.check()
        language = language_of(regex, None, self.tokenizer, begins=False)
        batches = list(checked(language, templates.eval_batches(), in_holes=True))
        records = self._decode(batches, self._within(decoder, language), seed, text_mask=templates.text_mask)
        found = [record["prediction"] for record in records]
        return found[0] if isinstance(texts, str) else found

    @overload
    def log_likelihood(  # type: ignore[overload-overlap]  # a str is a sequence of them
        self, texts: str, inputs: str = ..., *, objective: Objective | None = ..., num_draws: int = ..., seed: int = ...
    ) -> LogLikelihood: ...

    @overload
    def log_likelihood(
        self,
        texts: Sequence[str],
        inputs: str | Sequence[str] = ...,
        *,
        objective: Objective | None = ...,
        num_draws: int = ...,
        seed: int = ...,
    ) -> list[LogLikelihood]: ...

    def log_likelihood(
        self,
        texts: str | Sequence[str],
        inputs: str | Sequence[str] = "",
        *,
        objective: Objective | None = None,
        num_draws: int = 128,
        seed: int = 0,
    ) -> LogLikelihood | list[LogLikelihood]:
        """Measures log-likelihoods of texts, like `infer` in mode "score" (see docs/likelihood.md).

        Args:
          texts: one text, or several; EOS is appended to each and counted.
          inputs: one input for all texts, or one for each. An imported decoder-only model reads it as the preceding
            text.
          objective: the objective whose likelihood is measured; None takes the training objective.
          num_draws: number of passes for an estimate; an even number. Exact likelihoods take one pass.
          seed: random seed of the draws.

        Returns:
          One text's likelihood in nats, or a list of them.

        Raises:
          UserError: a text is too long, inputs for a model that takes none, or the model was not trained with this
            objective.
        """
        pairs = as_pairs(texts, inputs)
        objective = self._use(objective, self.objective, "objective")
        check_num_draws(num_draws)
        rows = self._rows(pairs)
        step = functools.partial(self._likelihood_program(objective, num_draws=num_draws), seed=seed_number(seed))
        batches: Batches = [(rows.batch(given, text, number), [{}]) for number, (text, given) in enumerate(pairs)]
        found = [
            LogLikelihood(record["log_likelihood"], record["standard_error"], record["num_tokens"])
            for record in likelihoods(step, self.params, batches, self.mesh, rows.to_text)
        ]
        return found[0] if isinstance(texts, str) else found

    def trace(
        self, prompt: str = "", *, decoder: Decoder | None = None, length: int | None = None, seed: int = 0
    ) -> Steps:
        """Answers a prompt as `generate` does, and keeps every step.

        Args:
          prompt: the text to answer.
          decoder, length, seed: as in `generate`.

        Raises:
          UserError: as `generate`.
        """
        decoder = self._use(decoder, self.decoder, "decoder")
        (record,) = self._decode(self._prompts(as_texts(prompt), length), decoder, seed, trace=True)
        return Steps(prompt, record["prediction"], traces.texts(record["trace"]), record, repr(decoder))

    def _prompts(self, texts: Sequence[str], length: int | None, stops: bool = False) -> Batches:
        if length is not None and (not isinstance(length, int) or length < 1):
            raise UserError(f"length must be at least 1, not {length!r}.")
        most, length = prompt_lengths(self._lengths, length, self.config)
        prompts = Prompts(self.tokenizer, self._inputs_end, most, length, self.config.architecture)
        # All at once, so that one that is too long is refused before the first is answered.
        rows = [(prompts.batch(text, number), [as_example(text)]) for number, text in enumerate(texts)]
        return together(rows, stops)

    def _within(self, decoder: Decoder | None, language: Language | None) -> Decoder | None:
        if language is None:
            return decoder
        return self._use(decoder, self.decoder, "decoder").within(language)

    def _decode(
        self, batches: Batches, decoder: Decoder | None, seed: int, **settings: Any
    ) -> Iterator[dict[str, Any]]:
        """Decodes batches; returns one record per text, like `infer`. See `Decoding.records` for the settings."""
        decoder = self._use(decoder, self.decoder, "decoder")
        return self._decoding.records(self.params, batches, decoder, self._rows([]), seed, **settings)

    @functools.cached_property
    def _decoding(self) -> Decoding:
        return Decoding(self.mesh, self.definition, self.tokenizer)

    @functools.cached_property
    def _likelihood_program(self) -> Callable[..., Any]:
        """Returns the program that measures likelihoods with these settings, compiled once for all seeds."""
        return functools.cache(functools.partial(make_likelihood_step, self.mesh, self.definition, seed=0))

    def _use(self, given: Any, own: Any, what: str) -> Any:
        """Returns the decoder or objective to use, checked against the training record."""
        used = own if given is None else given
        if used is None:
            raise UserError(f"{self.name} does not say which {what} suits it: give {what}=...")
        if used is not own:
            Agreement(self.name, self.record, "allow_mismatch", self.allow_mismatch).check(self.config, [used])
        return used

    @property
    def _lengths(self) -> Mapping[str, int] | None:
        return (self.record.dataset or {}).get("task_feature_lengths")

    @property
    def _inputs_end(self) -> bool:
        recorded = self.record.inputs_end
        return self.config.architecture == "encoder_decoder" if recorded is None else recorded

    def _rows(self, pairs: Sequence[tuple[str, str]]) -> TextRows:
        """Returns the row layout for (text, inputs) pairs: as in training, or as long as needed for imported models."""
        lengths = self._lengths
        has_inputs = any(inputs for _, inputs in pairs)
        if lengths is not None and has_inputs and "inputs" not in lengths:
            raise UserError(f"{self.name} was trained without inputs: leave them out.")
        if lengths is None:
            size = max((len(self.tokenizer.encode(text)) for pair in pairs for text in pair), default=0)
            room = room_for(size + 1, self.config.max_length)
            has_inputs |= self.config.architecture == "encoder_decoder"
            lengths = dict.fromkeys(["inputs", "targets"] if has_inputs else ["targets"], room)
        canvas = not self.record.imported and (self.record.dataset or {}).get("canvas", True)
        return TextRows(self.tokenizer, lengths, self.config.architecture, canvas, self._inputs_end, self.name)


def load(
    path: str | os.PathLike,
    *,
    vocabulary: "str | AnyVocabulary | None" = None,
    allow: Sequence[str] = (),
    allow_mismatch: bool = False,
) -> Model:
    """Opens a model.

    Model, vocabulary, lengths, decoder and objective come from the checkpoint's record.

    Args:
      path: a training run's MODEL_DIR, one of its checkpoints, a folder that `convert` wrote, a folder in Hugging
        Face's format, or a hub model as "org/name" or "org/name@revision" (downloaded once).
      vocabulary: a file (tokenizer.json, SentencePiece model, llama2.c's .bin) or a SeqIO vocabulary, for a checkpoint
        that does not record its own.
      allow: trusted packages or modules, besides diffusion_t5x, from which decoders and objectives that the checkpoint
        names may be imported.
      allow_mismatch: let decoders and objectives use the model in ways that it was not trained for.

    Raises:
      UserError: there is no model at `path`, it is broken, or its record is missing.
    """
    name, mesh = os.fspath(path), MeshConfig().make(jax.devices()[:1])
    record, tokenizer, definition, params = opened(name, mesh, vocabulary)
    decoder, objective = (
        rebuild(described, name, allow) if described and is_plain(described) else None
        for described in (record.decoder, record.objective)
    )
    return Model(name, record, params, tokenizer, decoder, objective, definition, mesh, allow_mismatch)
