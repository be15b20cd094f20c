"""Conversations in the Python API: `Model.chat`."""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from jax.sharding import Mesh

from diffusion_t5x.api_decoding import Batches, Decoding, together
from diffusion_t5x.api_values import as_example
from diffusion_t5x.chat.prompts import Prompts, prompt_lengths
from diffusion_t5x.data import conversations, stop_strings
from diffusion_t5x.data.chat_template import Message
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.structured import checked, language_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition, Params


class Chatting(abc.ABC):
    """A model that answers conversations in the chat template beside its tokenizer. A part of `Model`."""

    name: str
    params: Params
    tokenizer: AnyVocabulary
    decoder: Decoder | None
    definition: ModelDefinition
    mesh: Mesh

    @property
    @abc.abstractmethod
    def _lengths(self) -> Mapping[str, int] | None:
        """Maximum lengths of the features that it was trained on."""

    @abc.abstractmethod
    def _use(self, given: Any, own: Any, what: str) -> Any:
        """Returns the decoder or objective to use, checked against the training record."""

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        template_variables: Mapping[str, Any] | None = ...,
        decoder: Decoder | None = ...,
        length: int | None = ...,
        samples: Literal[1] = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        regex: str | None = ...,
        json_schema: str | Mapping[str, Any] | None = ...,
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        template_variables: Mapping[str, Any] | None = ...,
        decoder: Decoder | None = ...,
        length: int | None = ...,
        samples: Literal[1] = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        regex: str | None = ...,
        json_schema: str | Mapping[str, Any] | None = ...,
    ) -> list[str]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        template_variables: Mapping[str, Any] | None = ...,
        decoder: Decoder | None = ...,
        length: int | None = ...,
        samples: int,
        seed: int = ...,
        stop: Sequence[str] = ...,
        regex: str | None = ...,
        json_schema: str | Mapping[str, Any] | None = ...,
    ) -> Any: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        decoder: Decoder | None = None,
        length: int | None = None,
        samples: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
        regex: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers conversations. The same seed gives the same texts as `infer --messages`.

        Args:
          messages: a conversation, [{"role": "user", "content": "Hello."}], or several.
          tools: functions that the model may call, in OpenAI's form, for the chat template.
          template_variables: other variables of the chat template, such as {"enable_thinking": False}.
          decoder, length, samples, seed, stop, regex, json_schema: as in `Model.generate`.

        Returns:
          The answer to one conversation, or a list of answers. With several samples, each answer is a list of texts.

        Raises:
          UserError: the model has no chat template, or it refuses a conversation; or as `Model.generate`.
        """
        if not isinstance(samples, int) or samples < 1:
            raise UserError(f"samples must be at least 1, not {samples!r}.")
        stops = stop_strings.check(stop, "stop")
        if isinstance(messages, str | Mapping):
            raise UserError(f'messages must be a list, such as [{{"role": "user", "content": …}}], not {messages!r}.')
        if own := conversations.OWN_VARIABLES & {*(template_variables or ())}:
            raise UserError(f"template_variables cannot have {', '.join(sorted(own))}: Model.chat sets them itself.")
        is_one = isinstance(messages[0], Mapping) if messages else True
        talks: Any = [messages] if is_one else messages
        prompts = self._chat_prompts(length)
        variables = {**(template_variables or {}), **({} if tools is None else {"tools": list(tools)})}
        language = language_of(regex, json_schema, self.tokenizer, end_ids=prompts.end_ids)
        if stops and language is not None:
            raise UserError("stop would cut the text that regex or json_schema asks for: leave it out.")
        rows = [(prompts.answering(talk, number, variables), [as_example("")]) for number, talk in enumerate(talks)]
        batches: Batches = list(checked(language, together(rows, bool(stops))))
        decoder = self._use(decoder, self.decoder, "decoder")
        decoder = decoder if language is None else decoder.within(language)
        records = self._chat_decoding.records(self.params, batches, decoder, prompts, seed, samples, stops=stops)
        found = [record["predictions"] if samples > 1 else record["prediction"] for record in records]
        return found[0] if is_one else found

    def _chat_prompts(self, length: int | None) -> Prompts:
        if length is not None and (not isinstance(length, int) or length < 1):
            raise UserError(f"length must be at least 1, not {length!r}.")
        config = self.definition.config
        most, length = prompt_lengths(self._lengths, length, config)
        return Prompts(self.tokenizer, False, most, length, config.architecture, self._chat_format)

    @functools.cached_property
    def _chat_format(self) -> Chat:
        chat = Chat.of(self.tokenizer)
        if chat is None:
            raise UserError(
                f"{self.name} has no chat template: there is neither chat_template.jinja nor a chat_template in "
                "tokenizer_config.json beside a tokenizer.json. Use generate."
            )
        return chat

    @functools.cached_property
    def _chat_decoding(self) -> Decoding:
        """Programs for answers, which end with the turn."""
        ids = dataclasses.replace(self.definition.vocabulary, end_ids=self._chat_format.end_ids)
        return Decoding(self.mesh, dataclasses.replace(self.definition, vocabulary=ids), self.tokenizer)
