"""Conversations of yours as a task, by the chat template of a model's tokenizer: a turn of the assistant an example.

Its inputs are all that the template writes up to the turn, its targets the turn with the token that ends it. So every
turn of a conversation is learned, each once, from what the model reads when it answers, and nothing else is: that holds
for any objective and architecture.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from diffusion_t5x.data import chat_template
from diffusion_t5x.data.chat_template import ChatTemplate, Message
from diffusion_t5x.data.huggingface_vocabulary import HuggingFaceVocabulary
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.tasks import local_files, readers, registration
from diffusion_t5x.tasks.readers import Fields, Records
from diffusion_t5x.tasks.sources import Record

logger = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool")


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
      name: of the task.
      files: paths or glob patterns for each split, of JSON lines `{"messages": [{"role": ..., "content": ...}, ...]}`.
      vocabulary_file: a tokenizer.json, with its chat template beside it.
      template_variables: what the template may ask for besides, such as {"enable_thinking": False}.
      held_out: as `local_files.task`; the messages before the first answer decide, so a conversation stays together.
      metric_fns: for instance `(@metrics.bleu, @metrics.exact_match)`.

    Raises:
      UserError: no tokenizer.json, or no template beside it; on first reading what is wrong with a file.
    """
    vocabulary = registration.vocabulary(vocabulary_file)
    if not isinstance(vocabulary, HuggingFaceVocabulary):
        raise UserError(f"A chat template goes with a tokenizer.json, and VOCABULARY_FILE is {vocabulary_file}.")
    folder = pathlib.Path(vocabulary_file).expanduser().parent
    template = ChatTemplate.read(folder, vocabulary.special_tokens(), template_variables)
    return registration.add(
        name,
        source=local_files.source_of(
            files, lambda names: _turns(names, template), held_out, lambda turn: _encode(turn, vocabulary)
        ),
        preprocessors=[_keep_newest, seqio.preprocessors.append_eos_after_trim],
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=False),
            "targets": seqio.Feature(vocabulary, add_eos=True),
        },
        metric_fns=list(metric_fns),
        shuffle_buffer_size=1,
    )


def _turns(files: Sequence[str], template: ChatTemplate) -> Records:
    """The assistant's turns: "opening" (what is before the first), "prompt" and "answer", rendered."""
    lines = readers.Jsonl().read(files)
    conversations = dataclasses.replace(lines, parse=lambda i: {"messages": _messages(lines.parse(i))})
    turns = [
        (line, number)
        for line, conversation in enumerate(conversations)
        for number, message in enumerate(conversation["messages"])
        if message["role"] == "assistant"
    ]
    if silent := len(conversations) - len({line for line, _ in turns}):
        names = ", ".join(files)
        logger.warning("%s: %d of %d conversations have no assistant, left out", names, silent, len(conversations))

    def parse(index: int) -> Fields:
        line, number = turns[index]
        messages = conversations.parse(line)["messages"]
        first = [message["role"] for message in messages].index("assistant")
        prompt, answer = template.turn(messages, number)
        return {"opening": json.dumps(messages[:first]), "prompt": prompt, "answer": answer}

    return Records(len(turns), parse, lambda index: lines.where(turns[index][0]))


def _messages(record: Fields) -> list[Message]:
    """The messages of a line, without fields that are null; raises a ValueError where they are none."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'no "messages", a list of {{"role": …, "content": …}}.{did_you_mean("messages", record)}')
    for number, message in enumerate(messages, 1):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in ROLES:
            hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
            raise ValueError(f"message {number} has the role {json.dumps(role)}, not {', '.join(ROLES)}.{hint}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has the content {json.dumps(content)[:40]}, not text.")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _encode(turn: Fields, vocabulary: HuggingFaceVocabulary) -> Record:
    """The ids of a turn. BOS in front and EOS behind are left out: the start token and the task put them there."""
    prompt, answer = (chat_template.parts(turn[name]) for name in ("prompt", "answer"))

    def ids(parts: Sequence[str], begins: bool) -> list[int]:
        encoded = (vocabulary.encode_part(part, begins and not number) for number, part in enumerate(parts))
        return [token for tokens in encoded for token in tokens]

    inputs, targets = ids(prompt, begins=True), ids(answer, begins=False)
    text = "".join(prompt)
    if inputs[:1] == [vocabulary.bos_id]:
        inputs, text = inputs[1:], text.removeprefix(vocabulary.piece(inputs[0]).decode())
    if targets[-1:] == [vocabulary.eos_id]:
        targets = targets[:-1]
    return {
        "inputs": np.array(inputs, np.int32),
        "targets": np.array(targets, np.int32),
        "inputs_pretokenized": text,
        "targets_pretokenized": vocabulary.decode(targets),
    }


def _keep_newest(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None) -> tf.data.Dataset:
    """Of inputs that are too long the end, which asks for the answer; SeqIO would keep the beginning."""
    if sequence_length is None or "inputs" not in sequence_length:
        return dataset
    return dataset.map(lambda x: x | {"inputs": x["inputs"][-sequence_length["inputs"] :]})
