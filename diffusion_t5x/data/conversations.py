"""Conversations in records of data sets: the fields that hold them, by name, as messages for a chat template.

| fields | what they hold |
| --- | --- |
| `messages` | a list of {"role", "content"} |
| `conversations` | the same, or ShareGPT's {"from", "value"}; maybe with the text `system` |
| `chosen`, maybe with `prompt` | preference data: messages or texts; the answer is the one that was preferred |
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x import json_lines
from diffusion_t5x.data.chat_template import Message
from diffusion_t5x.errors import did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
_LISTS = ("tools", "documents")
_SOURCES = ("messages", "conversations", "chosen")
FIELDS = (*_SOURCES, "prompt", "system", "chat_template_kwargs", *_LISTS)
"""Names of the fields that are read."""
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "observation": "tool",
} | {role: role for role in ROLES}
OWN_VARIABLES = {"messages", "add_generation_prompt"}  # of chat templates, which are set for each conversation


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation.

    Attributes:
      messages: its messages, see `checked`.
      variables: other variables of the chat template: "tools", "documents" and those of "chat_template_kwargs".
    """

    messages: list[Message]
    variables: dict[str, Any]

    def question(self) -> tuple[list[Message], str | None]:
        """Returns the messages up to the last user turn, and the text of the answer after it; None without one."""
        last = self.messages[-1]
        if last["role"] != "assistant":
            return self.messages, None
        return self.messages[:-1], last.get("content") or ""


def has_messages(record: Mapping[str, Any]) -> bool:
    """True if a record has a field that holds a conversation."""
    return any(record.get(name) is not None for name in _SOURCES)


def read(record: Mapping[str, Any]) -> Conversation:
    """Returns the conversation of a record; of several fields that hold one, the first in the table above.

    Raises:
      ValueError: it has none, or an invalid one.
    """
    variables = {}
    for name in _LISTS:
        value = record.get(name)
        value = json_lines.parse(value) if isinstance(value, str) else value  # as in data sets of one type a column
        if value is not None:
            if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
                raise ValueError(f'"{name}" is {json.dumps(value)[:40]}, not a list of objects.')
            variables[name] = value
    if record.get("functions"):
        raise ValueError('"functions" is not read: name them as "tools", {"type": "function", "function": {…}}.')
    kwargs = record.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict) or OWN_VARIABLES & kwargs.keys():
        raise ValueError(f'"chat_template_kwargs" is {json.dumps(kwargs)[:40]}, not an object of variables.')
    return Conversation(checked(_messages(record)), {**variables, **kwargs})


def _messages(record: Mapping[str, Any]) -> list[Any]:
    """Returns the messages in a record's fields, with roles as templates name them."""
    source = next((name for name in _SOURCES if record.get(name) is not None), None)
    if source == "chosen":
        return _preferred(record)
    messages = record.get(source) if source else None
    if not isinstance(messages, list) or not messages:
        hint = "" if source else did_you_mean("messages", record)
        raise ValueError(f'no "{source or "messages"}", a list of {{"role": …, "content": …}}.{hint}')
    if source == "messages":
        return messages
    system = record.get("system")
    opening = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return opening + [_of_sharegpt(message, number) for number, message in enumerate(messages, 1)]


def _of_sharegpt(message: Any, number: int) -> Any:
    if not isinstance(message, dict) or "from" not in message:
        return message
    speaker = message["from"]
    if speaker not in _SHAREGPT:
        raise ValueError(f"message {number} is from {json.dumps(speaker)}, not {', '.join(_SHAREGPT)}.")
    return {"role": _SHAREGPT[speaker], "content": message.get("value")}


def _preferred(record: Mapping[str, Any]) -> list[Any]:
    """Returns the prompt and the preferred answer of preference data."""
    prompt, chosen = record.get("prompt"), record["chosen"]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    answer = [{"role": "assistant", "content": chosen}] if isinstance(chosen, str) else chosen
    if not isinstance(asked, list) or not isinstance(answer, list) or not answer:
        raise ValueError('"prompt" and "chosen" are texts, or lists of {"role": …, "content": …}.')
    if isinstance(chosen, str) and not asked:
        raise ValueError('"chosen" is a text without a "prompt" that it answers.')
    is_whole = isinstance(answer[0], dict) and answer[0].get("role") != "assistant"
    return answer if is_whole else [*asked, *answer]


def checked(messages: Sequence[Any]) -> list[Message]:
    """Returns messages, at least one, as chat templates read them: no null fields, and parts of text joined.

    Roles other than those in `ROLES` are left to the template, as in `transformers`, unless one is nearly spelled.

    Raises:
      ValueError: a message is invalid, or there is none.
    """
    if not messages:
        raise ValueError("it has no messages.")
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        hint = did_you_mean(role, ROLES) if isinstance(role, str) and role not in ROLES else ""
        if not isinstance(role, str) or not role or hint:
            raise ValueError(f"message {number} has the role {json.dumps(role)[:40]}, not {', '.join(ROLES)}.{hint}")
    return [_one_text(message, number) for number, message in enumerate(messages, 1)]


def _one_text(message: Mapping[str, Any], number: int) -> Message:
    """Returns a message without null fields, whose content is one text."""
    fields = {key: x for key, x in message.items() if x is not None}
    content = fields.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds, texts = ([part.get(key) for part in content] for key in ("type", "text"))
        if others := [kind for kind in kinds if isinstance(kind, str) and kind != "text"]:
            raise ValueError(
                f"message {number} has a part of the type {json.dumps(others[0])[:40]}: only text is read."
            )
        if set(kinds) == {"text"} and all(isinstance(text, str) for text in texts):
            content = "".join(texts)
    is_call = content is None and fields["role"] == "assistant" and fields.get("tool_calls")
    if not isinstance(content, str) and not is_call:
        raise ValueError(f"message {number} has the content {json.dumps(content)[:40]}, not text.")
    return fields if is_call else {**fields, "content": content}
