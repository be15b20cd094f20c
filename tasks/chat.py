"""Conversations as a task, with the chat template of a model's tokenizer: one example per assistant turn.

Its inputs are everything that the template writes up to the turn, its targets the turn with the token that ends it. So
every assistant turn is learned exactly once, from the text that the model reads when it answers, and nothing else is
learned, with any objective and architecture.
"""

import collections
import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_t5x import json_lines
from diffusion_t5x.data import chat_template, libraries, vocabulary_files
from diffusion_t5x.data.chat_template import ChatTemplate, Message
from diffusion_t5x.data.huggingface_vocabulary import HuggingFaceVocabulary
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.tasks import local_files, readers, registration
from diffusion_t5x.tasks.readers import Fields, Records
from diffusion_t5x.tasks.sources import Record

if TYPE_CHECKING:
    import tensorflow as tf

logger = logging.getLogger(__name__)

_LISTS = ("tools", "documents")
_FIELDS = ("messages", "chat_template_kwargs", *_LISTS)
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
      name: name of the task.
      files: paths or glob patterns for each split, of JSON lines `{"messages": [{"role": ..., "content": ...}, ...]}`,
        optionally with "tools", "documents" or "chat_template_kwargs" for the template.
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
    folder = pathlib.Path(vocabulary_file).expanduser().parent
    template = ChatTemplate.read(folder, vocabulary.special_tokens(), template_variables)
    source = local_files.source_of(
        files, lambda names: _turns(names, template), held_out, lambda turn: _encode(turn, vocabulary)
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
    lines = readers.Jsonl().read(files)
    conversations = dataclasses.replace(lines, parse=lambda i: _conversation(lines.parse(i)))
    turns: list[tuple[int, int]] = []
    unread: collections.Counter[str] = collections.Counter()
    names = ", ".join(files)
    for line, conversation in enumerate(conversations):
        turns += [(line, n) for n, message in enumerate(conversation["messages"]) if message["role"] == "assistant"]
        unread.update(name for name, value in conversation["variables"].items() if value and name not in template.names)
    if silent := len(conversations) - len({line for line, _ in turns}):
        logger.warning(
            "%s: %d of %d conversations have no assistant turn and are left out", names, silent, len(conversations)
        )
    for name, count in unread.items():
        logger.warning(
            "%s: %d of %d conversations have %s, which the chat template does not read",
            names,
            count,
            len(conversations),
            name,
        )
    if unused := [name for name in lines[0] if name not in _FIELDS]:
        logger.info("%s: fields that are not read: %s", names, ", ".join(unused))

    def parse(index: int) -> Fields:
        line, number = turns[index]
        conversation = conversations.parse(line)
        messages = conversation["messages"]
        first = [message["role"] for message in messages].index("assistant")
        prompt, answer = template.turn(messages, number, conversation["variables"])
        return {"opening": json.dumps(messages[:first]), "prompt": prompt, "answer": answer}

    return Records(len(turns), parse, lambda index: lines.where(turns[index][0]))


def _conversation(record: Fields) -> Fields:
    """Returns the messages of a line, and its other template variables; raises a ValueError if they are invalid."""
    variables = {}
    for name in _LISTS:
        value = record.get(name)
        value = (
            json_lines.parse(value) if isinstance(value, str) else value
        )  # as data sets of one type a column have it
        if value is not None:
            if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
                raise ValueError(f'"{name}" is {json.dumps(value)[:40]}, not a list of objects.')
            variables[name] = value
    if record.get("functions"):
        raise ValueError('"functions" is not read: name them as "tools", {"type": "function", "function": {…}}.')
    kwargs = record.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict) or {"messages", "add_generation_prompt"} & kwargs.keys():
        raise ValueError(f'"chat_template_kwargs" is {json.dumps(kwargs)[:40]}, not an object of variables.')
    return {"messages": _messages(record), "variables": {**variables, **kwargs}}


def _messages(record: Fields) -> list[Message]:
    """Returns the messages of a line, without null fields; raises a ValueError if they are invalid."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'no "messages", a list of {{"role": …, "content": …}}.{did_you_mean("messages", record)}')
    for number, message in enumerate(messages, 1):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in ROLES:
            hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
            raise ValueError(f"message {number} has the role {json.dumps(role)}, not {', '.join(ROLES)}.{hint}")
        is_call = content is None and role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not is_call:
            raise ValueError(f"message {number} has the content {json.dumps(content)[:40]}, not text.")
    # A call's content may be null, which templates tell from none.
    return [{key: x for key, x in message.items() if x is not None or key == "content"} for message in messages]


def _encode(turn: Fields, vocabulary: HuggingFaceVocabulary) -> Record:
    """Returns the ids of a turn, without the BOS that the tokenizer adds to any text, and without EOS at the end.

    A model reads the start token in place of BOS, and the task adds EOS.
    """
    prompt, answer = (chat_template.parts(turn[name]) for name in ("prompt", "answer"))

    def ids(parts: Sequence[str], begins: bool) -> list[int]:
        encoded = (vocabulary.encode_part(part, begins and not number) for number, part in enumerate(parts))
        return [token for tokens in encoded for token in tokens]

    inputs, targets = ids(prompt, begins=True), ids(answer, begins=False)
    text = "".join(prompt)
    if vocabulary.adds_bos and inputs[:1] == [vocabulary.bos_id]:
        inputs, text = inputs[1:], text.removeprefix(vocabulary.piece(inputs[0]).decode())
    if targets[-1:] == [vocabulary.eos_id]:
        targets = targets[:-1]
    return {
        "inputs": np.array(inputs, np.int32),
        "targets": np.array(targets, np.int32),
        "inputs_pretokenized": text,
        "targets_pretokenized": vocabulary.decode(targets),
    }


def _keep_newest(dataset: "tf.data.Dataset", sequence_length: Mapping[str, int] | None) -> "tf.data.Dataset":
    """Keeps the end of inputs that are too long, which asks for the answer; SeqIO would keep the beginning."""
    if sequence_length is None or "inputs" not in sequence_length:
        return dataset
    return dataset.map(lambda x: x | {"inputs": x["inputs"][-sequence_length["inputs"] :]})
