"""Conversations to answer, from files: rows of what the model reads before the answer to the last user turn."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_t5x.data import conversations, text_files
from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.dataset import OfTexts
from diffusion_t5x.data.rows import LaidOut, RowLayout, check_rows, fill_batches
from diffusion_t5x.data.vocabularies import TokenIds, to_text
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.tasks import readers

_Question = tuple[list[int], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatQuestions(OfTexts, LaidOut):
    """Conversations of JSON lines or Parquet as a data set for decoding, without a task.

    If a conversation ends with the assistant's turn, the model answers in its place, and it is the target.

    Attributes:
      files: a path or pattern, or several; see `conversations.read` for the fields.
      tokenizer: the model's vocabulary, a tokenizer.json with its chat template beside it.
      task_feature_lengths: maximum number of tokens of a conversation, `inputs`, and of an answer, `targets`. No
        conversation is cut.
      template_variables: other variables of the template, such as {"enable_thinking": False}.
      architecture: the model's architecture.
      batch_size: number of rows in a batch.
    """

    files: text_files.Patterns
    tokenizer: AnyVocabulary
    task_feature_lengths: Mapping[str, int]
    template_variables: Mapping[str, Any] | None = None
    architecture: Architecture = "decoder_only"
    batch_size: int = 128

    split = "answers"
    pack = False
    canvas = True

    @property
    def name(self) -> str:
        """Name of the first file, without its ending."""
        return pathlib.Path(text_files.expand(self.files)[0]).name.partition(".")[0]

    def vocabulary(self) -> AnyVocabulary:
        return self.tokenizer

    def token_ids(self) -> TokenIds:
        """The vocabulary's special ids; the end of a turn ends an answer, too."""
        return dataclasses.replace(super().token_ids(), end_ids=self._chat.end_ids)

    def to_text(self, tokens: Sequence[int]) -> str:
        """Returns the text of an answer, up to the token that ends it."""
        return to_text(self.tokenizer, tokens, self._chat.end_ids)

    def check(self) -> None:
        """Reads and encodes all conversations.

        Raises:
          UserError: no chat template, lengths without inputs and targets, or a conversation that is broken or too long.
        """
        if set(self.task_feature_lengths) != {"inputs", "targets"}:
            raise UserError(
                f"TASK_FEATURE_LENGTHS must name inputs and targets, not {dict(self.task_feature_lengths)}."
            )
        check_rows(self.task_feature_lengths, self.batch_size, pack=False, canvas=True)
        self._questions  # noqa: B018

    def num_eval_examples(self, num_examples: int | None = None) -> int:
        """Returns the number of conversations, at most `num_examples`."""
        return len(self._questions[:num_examples])

    def eval_examples(self, num_examples: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields the dictionaries of `eval_batches`."""
        return (example for _, example in self._questions[:num_examples])

    def eval_batches(self, num_examples: int | None = None) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
        """Yields batches, and for each row `example_id`, `inputs_pretokenized` and `targets_pretokenized`.

        The inputs are the conversation as the template writes it; the targets are empty where no answer is given.
        """
        pad_id = self.tokenizer.pad_id
        layout = RowLayout(self.task_feature_lengths, self.architecture, canvas=True, pad_id=pad_id)
        blank = np.zeros(0, np.int32)
        rows = (
            (layout.row(layout.sequences({"inputs": np.array(ids, np.int32), "targets": blank})), example)
            for ids, example in self._questions[:num_examples]
        )
        yield from fill_batches(rows, self.batch_size, pad_id)

    @functools.cached_property
    def _chat(self) -> Chat:
        chat = Chat.of(self.tokenizer, self.template_variables)
        if chat is None:
            raise UserError(
                "The model's vocabulary has no chat template: there is neither chat_template.jinja nor a chat_template "
                "in tokenizer_config.json beside a tokenizer.json. Answer a task's inputs instead."
            )
        return chat

    @functools.cached_property
    def _questions(self) -> list[_Question]:
        chat, records = self._chat, readers.Structured().read(text_files.expand(self.files))
        talks = dataclasses.replace(records, parse=lambda i: self._question(chat, records.parse(i), i))
        return list(talks)

    def _question(self, chat: Chat, record: readers.Fields, number: int) -> _Question:
        """Returns the ids and the example of a record; raises a ValueError if it is invalid or too long."""
        talk = conversations.read(record)
        messages, answer = talk.question()
        if not messages or messages[-1]["role"] in ("system", "developer", "assistant"):
            raise ValueError("apart from the answer, its last turn is not the user's.")
        ids, text = chat.encode_prompt(chat.template.render(messages, True, talk.variables))
        if len(ids) > (most := self.task_feature_lengths["inputs"]):
            raise ValueError(
                f"the conversation has {len(ids)} tokens, and TASK_FEATURE_LENGTHS has room for {most} inputs. Nothing "
                "is cut: shorten it, or raise them."
            )
        return ids, {"example_id": number, "inputs_pretokenized": text, "targets_pretokenized": answer or ""}
