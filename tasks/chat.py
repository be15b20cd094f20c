"""Conversations as a task, with the chat template of a model's tokenizer: one example per assistant turn.

Its inputs are everything that the template writes up to the turn, its targets the turn with the token that ends it. So
every assistant turn is learned exactly once, from the text that the model reads when it answers, and nothing else is
learned, with any objective and architecture.
"""

import collections
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_t5x.data import conversations, libraries, vocabulary_files
from diffusion_t5x.data.chat_template import ChatTemplate
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.conversations import Conversation
from diffusion_t5x.data.huggingface_vocabulary import HuggingFaceVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.tasks import local_files, readers, registration
from diffusion_t5x.tasks.readers import Fields, Records
from diffusion_t5x.tasks.sources import Record

if TYPE_CHECKING:
    import tensorflow as tf

logger = logging.getLogger(__name__)


def task(
    name: str,
    files: Mapping[str, local_files.Patterns],
    vocabulary_file: str,
    template_variables: Mapping[str, Any] | None = None,
    held_out: Mapping[str, float] | None = None,
    metric_fns: Sequence[registration.MetricFn] = (),
) -> str:
    """Registers a SeqIO task over files of conversations and returns its name. Only the tokenizer's files are read.

    Args:
      name: name of the task.
      files: paths or glob patterns for each split, of JSON lines or Parquet: `{"messages": [{"role": ..., "content":
        ...}, ...]}`, or a conversation in other fields that `data.conversations` reads, optionally with "tools",
        "documents" or "chat_template_kwargs" for the template.
      vocabulary_file: a tokenizer.json, with its chat template beside it.
      template_variables: other variables of the template, such as {"enable_thinking": False}.
      held_out: as in `local_files.task`; the messages before the first answer decide, so a conversation stays together.
      metric_fns: for instance `(@metrics.bleu, @metrics.exact_match)`.

    Raises:
      UserError: there is no tokenizer.json, or no template beside it; on first reading, errors in a file.
    """
    vocabulary = vocabulary_files.vocabulary(vocabulary_file)
    if not isinstance(vocabulary, HuggingFaceVocabulary):
        raise UserError(f"A chat template needs a tokenizer.json, but VOCABULARY_FILE is {vocabulary_file}.")
    template = ChatTemplate.read(vocabulary.folder, vocabulary.special_tokens(), template_variables)
    chat = Chat(vocabulary, template)
    source = local_files.source_of(
        files, lambda names: _turns(names, template), held_out, lambda turn: _encode(turn, chat)
    )

    def make() -> dict[str, Any]:
        import seqio

        features = {name: seqio.Feature(vocabulary, add_eos=name == "targets") for name in ("inputs", "targets")}
        return {
            "source": source.in_seqio(),
            "preprocessors": [_keep_newest, seqio.preprocessors.append_eos_after_trim],
            "output_features": features,
            "metric_fns": list(metric_fns),
            "shuffle_buffer_size": 1,
        }

    registration.add(name, make)
    libraries.sources[name] = source
    return name


def _turns(files: Sequence[str], template: ChatTemplate) -> Records:
    """Returns the assistant's turns: "opening" (the text before the first), "prompt" and "answer", rendered."""
    lines = readers.Structured().read(files)
    talks: Records[Conversation] = dataclasses.replace(lines, parse=lambda i: conversations.read(lines.parse(i)))
    turns: list[tuple[int, int]] = []
    unread: collections.Counter[str] = collections.Counter()
    names = ", ".join(files)
    for line, talk in enumerate(talks):
        turns += [(line, n) for n, message in enumerate(talk.messages) if message["role"] == "assistant"]
        unread.update(name for name, value in talk.variables.items() if value and name not in template.names)
    if silent := len(talks) - len({line for line, _ in turns}):
        logger.warning("%s: %d of %d conversations have no assistant turn and are left out", names, silent, len(talks))
    for name, count in unread.items():
        said = "%s: %d of %d conversations have %s, which the chat template does not read"
        logger.warning(said, names, count, len(talks), name)
    if unused := [name for name in lines[0] if name not in conversations.FIELDS]:
        logger.info("%s: fields that are not read: %s", names, ", ".join(unused))

    def parse(index: int) -> Fields:
        line, number = turns[index]
        talk = talks.parse(line)
        first = [message["role"] for message in talk.messages].index("assistant")
        prompt, answer = template.turn(talk.messages, number, talk.variables)
        return {"opening": json.dumps(talk.messages[:first]), "prompt": prompt, "answer": answer}

    return Records(len(turns), parse, lambda index: lines.where(turns[index][0]))


def _encode(turn: Fields, chat: Chat) -> Record:
    """Returns the ids of a turn, without EOS at the end, which the task adds."""
    inputs, text = chat.encode_prompt(turn["prompt"])
    targets = chat.encode_answer(turn["answer"])
    return {
        "inputs": np.array(inputs, np.int32),
        "targets": np.array(targets, np.int32),
        "inputs_pretokenized": text,
        "targets_pretokenized": chat.vocabulary.decode(targets),
    }


def _keep_newest(dataset: "tf.data.Dataset", sequence_length: Mapping[str, int] | None) -> "tf.data.Dataset":
    """Keeps the end of inputs that are too long, which asks for the answer; SeqIO would keep the beginning."""
    if sequence_length is None or "inputs" not in sequence_length:
        return dataset
    return dataset.map(lambda x: x | {"inputs": x["inputs"][-sequence_length["inputs"] :]})
