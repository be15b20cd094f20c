"""A model's chat format: its vocabulary with its chat template, which turns conversations into token ids."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

from diffusion_t5x.data import chat_template, tokenizer_files
from diffusion_t5x.data.chat_template import ChatTemplate, Message
from diffusion_t5x.data.huggingface_vocabulary import HuggingFaceVocabulary
from diffusion_t5x.data.vocabulary import AnyVocabulary

_GENERATION = "generation_config.json"
_ANSWER = "Ω"  # in no special token
_TRIAL = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]


@dataclasses.dataclass(frozen=True)
class Chat:
    """Encodes conversations as `apply_chat_template` in `transformers` does, with two exceptions.

    A BOS in front is left out where the tokenizer adds one to any text: a model reads its start token there. And the
    content of a message never becomes a special token.

    Attributes:
      vocabulary: the model's vocabulary.
      template: its chat template.
    """

    vocabulary: HuggingFaceVocabulary
    template: ChatTemplate

    @classmethod
    def of(cls, vocabulary: AnyVocabulary, variables: Mapping[str, Any] | None = None) -> Self | None:
        """Reads the chat template beside a tokenizer.json; None if there is none, or another kind of vocabulary.

        Args:
          vocabulary: the model's vocabulary.
          variables: more variables of the template, such as {"enable_thinking": False}.

        Raises:
          UserError: the template cannot be read.
        """
        if not isinstance(vocabulary, HuggingFaceVocabulary) or not chat_template.is_in(vocabulary.folder):
            return None
        return cls(vocabulary, ChatTemplate.read(vocabulary.folder, vocabulary.special_tokens(), variables))

    def prompt_ids(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Returns the ids that the model reads before it answers a conversation.

        Args:
          messages: [{"role": "user", "content": "…"}, …]; see `conversations.read` for those of a data set.
          variables: more variables of this conversation, such as "tools".

        Raises:
          ValueError: the template refuses the conversation; the message says why.
        """
        return self.encode_prompt(self.template.render(messages, add_generation_prompt=True, variables=variables))[0]

    def encode_prompt(self, rendered: str) -> tuple[list[int], str]:
        """Returns the ids and the text of a rendered prompt (see `ChatTemplate.render`), without a BOS that is added.

        A model reads the start token in its place.
        """
        ids, text = self._encode(rendered, begins=True), "".join(chat_template.parts(rendered))
        if self.vocabulary.adds_bos and ids[:1] == [self.vocabulary.bos_id]:
            return ids[1:], text.removeprefix(self.vocabulary.piece(ids[0]).decode())
        return ids, text

    def encode_continued(self, rendered: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the ids of a rendered prompt, and those of a text that goes on from there.

        The latter are what the whole text has after the prompt, unless a token would reach over the border.
        """
        before, whole = (self.encode_prompt(text)[0] for text in (rendered, rendered + continuation))
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self._encode(continuation, begins=False)

    def encode_answer(self, rendered: str) -> list[int]:
        """Returns the ids of a rendered answer (see `ChatTemplate.turn`), without EOS at its end."""
        ids = self._encode(rendered, begins=False)
        return ids[:-1] if ids[-1:] == [self.vocabulary.eos_id] else ids

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids besides EOS that end an answer, ascending.

        They are those that generation_config.json beside the tokenizer names, and the special token that the template
        puts behind an answer.

        Raises:
          UserError: generation_config.json cannot be read.
        """
        said = tokenizer_files.read(self.vocabulary.folder / _GENERATION).get("eos_token_id")
        ids = {token for token in (said if isinstance(said, list) else [said]) if isinstance(token, int)}
        try:
            _, answer = self.template.turn(_TRIAL, 1)
        except ValueError:  # a template may want other conversations
            answer = ""
        if answer.rpartition(_ANSWER)[2].endswith(tuple(self.vocabulary.special_tokens())):
            ids.add(self._encode(answer, begins=False)[-1])
        return tuple(sorted(ids - {self.vocabulary.eos_id}))

    def _encode(self, rendered: str, begins: bool) -> list[int]:
        parts = enumerate(chat_template.parts(rendered))
        encoded = (self.vocabulary.encode_part(part, begins and not number) for number, part in parts)
        return [token for tokens in encoded for token in tokens]
