"""Lays out prompts as rows, like the examples of the model's task but without the task."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_t5x.data import conversations, stop_strings
from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.data.chat_template import Message
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.plain_vocabularies import TokenIdVocabulary
from diffusion_t5x.data.rows import RowLayout, fill_batches
from diffusion_t5x.data.text_rows import room_for
from diffusion_t5x.data.vocabularies import cells, signs, to_text
from diffusion_t5x.data.vocabulary import AnyVocabulary, own
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig

_LENGTH = 256  # of what a model writes whose task is not known


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Converts prompts to rows, one at a time, and decoded tokens to text.

    Attributes:
      vocabulary: the model's vocabulary.
      adds_eos: append EOS to prompts, as the model's task does to its inputs.
      max_inputs: maximum number of tokens in a prompt, including EOS; None sets no limit.
      length: number of tokens in the canvas.
      architecture: the model's architecture.
      chat: the model's chat format; None encodes prompts as they are.
      system: the system prompt that opens each conversation; None for none.
      stops: strings before which an answer ends, see `stop_strings.trim`.
    """

    vocabulary: AnyVocabulary
    adds_eos: bool
    max_inputs: int | None
    length: int
    architecture: Architecture
    chat: Chat | None = None
    system: str | None = None
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(own(self.vocabulary), TokenIdVocabulary):
            raise UserError(
                f"The model's vocabulary is a {type(self.vocabulary).__name__}, which has ids and no texts: a prompt "
                "cannot be encoded with it. Use infer with a task of token ids."
            )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, besides EOS and pad."""
        return self.chat.end_ids if self.chat else ()

    def batch(self, prompt: str, number: int) -> Batch:
        """Returns a batch of one row: the prompt and a canvas.

        Args:
          prompt: text; it is encoded as it is, or in a chat as the first turn of a conversation.
          number: the row's example id, which its random draws depend on.

        Raises:
          UserError: the prompt is too long, is not text, or leaves an encoder nothing to read.
        """
        if self.chat:
            return self.answering(self.opening(prompt), number)
        _check_text(prompt)
        return self.row(list(self.vocabulary.encode(prompt)) + [self.vocabulary.eos_id] * self.adds_eos, number)

    def opening(self, prompt: str) -> list[Message]:
        """Returns the first messages of a conversation: the system prompt, if there is one, and the user's."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]

    def answering(self, messages: Sequence[Message], number: int, variables: Mapping[str, Any] | None = None) -> Batch:
        """Returns a batch of one row: a conversation that asks for an answer, and a canvas.

        Args:
          messages: see `conversations.checked`.
          number: as in `batch`.
          variables: more variables of the chat template, such as "tools".

        Raises:
          UserError: the conversation is too long or not text, or the chat template refuses it.
        """
        assert self.chat is not None, "conversations need a chat format"
        try:
            messages = conversations.checked(messages)
            for message in messages:
                _check_text(message.get("content", ""))
            tokens = self.chat.prompt_ids(messages, variables)
        except ValueError as error:
            raise UserError(f"The conversation is refused: {error}") from error
        if self.max_inputs is not None and len(tokens) > self.max_inputs:
            raise UserError(
                f"The conversation is too long: with the chat template it has {len(tokens)} tokens, and the model "
                f"takes {self.max_inputs} before an answer of {self.length}. Nothing is truncated: shorten it (in a "
                "chat, /undo or /reset), or ask for a shorter answer."
            )
        return self.row(tokens, number)

    def row(self, tokens: Sequence[int], number: int) -> Batch:
        """Returns a batch of one row: a prompt's tokens and a canvas.

        Raises:
          UserError: as `batch`.
        """
        if self.max_inputs is not None and len(tokens) > self.max_inputs:
            eos = " (the EOS behind it is one of them)" if self.adds_eos else ""
            raise UserError(
                f"The prompt is refused: it has {len(tokens)} tokens{eos}, and the model takes {self.max_inputs}. "
                "Nothing is truncated: shorten it, or set other lengths with --gin.TASK_FEATURE_LENGTHS."
            )
        if self.architecture == "encoder_decoder" and not tokens:
            raise UserError("The prompt is refused: it is empty, and the encoder would have nothing to read.")
        lengths = {"inputs": room_for(len(tokens), self.max_inputs), "targets": self.length}
        layout = RowLayout(lengths, self.architecture, canvas=True, pad_id=self.vocabulary.pad_id)
        row = layout.row(layout.sequences({"inputs": np.array(tokens, np.int32), "targets": np.zeros(0, np.int32)}))
        ((batch, _),) = fill_batches([(row, None)], 1, self.vocabulary.pad_id)
        return batch.replace(example_ids=np.array([number], np.int32))

    def to_text(self, tokens: Sequence[int]) -> str:
        """Returns the text of a canvas, up to the token that ends it or before the first stop string."""
        return stop_strings.trim(to_text(self.vocabulary, tokens, self.end_ids), self.stops).text

    def is_enough(self, tokens: Sequence[int]) -> bool:
        """Returns True if a text that begins with these tokens has a stop string."""
        return stop_strings.stopped(to_text(self.vocabulary, tokens, self.end_ids), self.stops)

    def cells(self, tokens: Sequence[int]) -> list[str]:
        """Returns the texts of a canvas's tokens, one each; see `vocabularies.cells`."""
        return cells(self.vocabulary, tokens, signs(self.vocabulary))


def _check_text(text: str) -> None:
    """Raises a UserError for bytes that a terminal or a pipe gave, in Python's disguise."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("The prompt is refused: it is not UTF-8.") from error


def prompt_lengths(
    features: Mapping[str, int] | None, length: int | None, model: ModelConfig
) -> tuple[int | None, int]:
    """Returns the maximum number of tokens in a prompt (None: no limit) and in an answer.

    Args:
      features: the feature lengths of the model's task, if known.
      length: length of an answer; None takes the task's, or at most 256.
      model: the model's dimensions, which may include a maximum length.
    """
    is_one_row = model.architecture == "decoder_only"
    if features is not None and not {"targets"} <= features.keys() <= {"inputs", "targets"}:
        raise UserError(f"TASK_FEATURE_LENGTHS must have targets, and may have inputs: {dict(features)}.")
    if features and "inputs" in features:
        inputs, targets = features["inputs"], length or features["targets"]
        model.check_length(inputs + targets if is_one_row else max(inputs, targets), "TASK_FEATURE_LENGTHS or --length")
        return inputs, targets
    most = features["targets"] if features else model.max_length
    if most is None:
        return None, length or _LENGTH
    length = length or min(_LENGTH, most // 2)
    if is_one_row and length >= most:
        raise UserError(f"--length {length} leaves no room for a prompt: the model has {most} tokens for both.")
    return most - length if is_one_row else most, length
