"""A model's chat template, the Jinja file that comes with its tokenizer: renders conversations turn by turn.

A template is somebody else's program, so it runs in Jinja's sandbox, in a separate process with limits on time and
memory, and sees plain JSON.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from diffusion_t5x.data import template_process, text_files, tokenizer_files
from diffusion_t5x.errors import UserError

Message = Mapping[str, Any]

_FILE, _KEY = "chat_template.jinja", "chat_template"  # where a template stands: a file, or in tokenizer_config.json
_MARK = "\U0010ffff"  # Unicode keeps it for a program's own use
# What asks for an answer may begin it with a thought, as DeepSeek-R1's template does.
_OPEN_THOUGHT = re.compile(r"<([\w:]+)>\s*\Z")
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of a message's thought, the most usual one first
_TOKENS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class ChatTemplate:
    """Renders conversations like `transformers`, except that nothing in a message becomes a special token.

    Args:
      text: the template.
      tokens: the special tokens that it may name: "bos_token", "eos_token" ...
      special: texts that the tokenizer turns into special tokens wherever they appear.
      variables: more variables that it may name, such as {"enable_thinking": False}.
      tool_use: a template for conversations with tools; None uses `text` for them as well.

    Attributes:
      text: the template.
      names: the variables that the templates read.

    Raises:
      UserError: it is not valid Jinja.
    """

    def __init__(
        self,
        text: str,
        tokens: Mapping[str, str],
        special: Collection[str],
        variables: Mapping[str, Any] | None = None,
        tool_use: str | None = None,
    ):
        self.text, self._tool_use = text, text if tool_use is None else tool_use
        try:
            json.dumps(variables)
            known = map(template_process.shared().names, (self.text, self._tool_use))
            self.names = frozenset(itertools.chain.from_iterable(known))
        except TypeError as error:
            raise UserError(f"TEMPLATE_VARIABLES must be plain values, not {variables!r}.") from error
        except ValueError as error:
            raise UserError(f"The chat template is not valid Jinja: {error}.") from error
        self._known = {"tools": None, "documents": None, **tokens, **(variables or {})}
        longest_first = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"
        self._special = re.compile(longest_first)
        self._starts = re.compile(f"(?={longest_first})")  # of those that overlap, too
        self._uncuttable = [token for token in special if len(token) == 1]

    @classmethod
    def read(cls, folder: pathlib.Path, special: Collection[str], variables: Mapping[str, Any] | None = None) -> Self:
        """Reads the template in a tokenizer's folder: chat_template.jinja, or "chat_template" in tokenizer_config.json.

        Of several named templates it takes "default", and "tool_use" for conversations with tools, like `transformers`.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        file, config_file = folder / _FILE, folder / tokenizer_files.CONFIG
        config = tokenizer_files.read(config_file)
        text, tool_use = config.get(_KEY), None
        if isinstance(text, list):  # several by name
            if not all(isinstance(each, dict) and {"name", "template"} <= each.keys() for each in text):
                raise UserError(f'{config_file}: each chat_template of a list has a "name" and a "template".')
            named = {each["name"]: each["template"] for each in text}
            text, tool_use = named.get("default"), named.get("tool_use")
        if file.exists():
            text, more = text_files.text(file), folder / "additional_chat_templates" / "tool_use.jinja"
            tool_use = text_files.text(more) if more.exists() else None
        if not isinstance(text, str):
            raise UserError(
                f"{folder} has no chat template: neither chat_template.jinja nor a chat_template in "
                "tokenizer_config.json. Is it the folder of a chat model?"
            )
        tokens = {name: token for name in _TOKENS if (token := tokenizer_files.token_text(config, name, config_file))}
        return cls(text, tokens, special, variables, tool_use)

    def has(self, text: str) -> bool:
        """True if the template of conversations with tools has a text, such as a tag."""
        return text in self._tool_use

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the text of a conversation; at its end the assistant's turn may begin.

        Inside a message, the text of a special token is marked as a cut, which `parts` finds.

        Args:
          messages: the messages of the conversation.
          add_generation_prompt: ask for an answer.
          variables: more variables of the conversation, such as "tools".

        Raises:
          ValueError: the template refuses the conversation, fails, or takes too much time or memory.
        """
        return self._render([(messages, add_generation_prompt)], variables)[0]

    def unfinished(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """Returns the text of a conversation up to the end of its last message, which the model is to go on with.

        Raises:
          ValueError: as `render`, or the template writes the last message otherwise.
        """
        text, content = self.render(messages, variables=variables), self._mark(messages[-1]["content"])
        start = text.rfind(content.strip())
        if start < 0 or not content.strip():
            raise ValueError("the chat template changes the last message, which the model is to go on with.")
        is_whole = text.startswith(content.lstrip(), start)
        return text[: start + len(content.lstrip() if is_whole else content.strip())]

    def turn(
        self, messages: Sequence[Message], number: int, variables: Mapping[str, Any] | None = None
    ) -> tuple[str, str]:
        """Returns what the model reads before it writes `messages[number]`, and what it then writes.

        The latter ends with the last special token after the message; anything that a template puts after it, such as a
        line end, begins the next prompt. If the template prompts with an open thought, which it leaves out of past
        answers, the thought is the message's (empty if it has none), and is closed before the answer.

        Raises:
          ValueError: as `render`, or the template begins a turn otherwise than it asks for one.
        """
        prompt, text = self._render([(messages[:number], True), (messages[: number + 1], False)], variables)
        thought = _OPEN_THOUGHT.search(prompt)
        if text.startswith(prompt):
            answer = text[len(prompt) :]
        elif thought and text.startswith(prompt[: thought.start()]):
            answer = self._behind_thought(text[thought.start() :], messages[number], thought[1])
        else:
            raise ValueError(
                f"the chat template asks for message {number + 1} with {prompt[-40:]!r}, but writes it differently."
            )
        ends = [special.end() for special in self._special.finditer(answer)]
        return prompt, answer[: ends[-1]] if ends else answer

    def _behind_thought(self, written: str, message: Message, tag: str) -> str:
        """Returns the part of an answer after the tag that opens a thought."""
        begins, ends = f"<{tag}>", f"</{tag}>"
        if written.lstrip().startswith(begins):  # with other spaces than the prompt has
            return written.lstrip().removeprefix(begins).lstrip("\n")
        if ends in written:
            return written
        thought = next((message[name] for name in _THOUGHTS if isinstance(message.get(name), str)), "")
        content = message.get("content") or ""
        if ends in content:
            thought = content.rpartition(ends)[0].lstrip().removeprefix(begins)
        return f"{self._mark(thought.strip(chr(10)))}\n{ends}\n\n{written.lstrip(chr(10))}"

    def _render(
        self, asked: Sequence[tuple[Sequence[Message], bool]], variables: Mapping[str, Any] | None
    ) -> list[str]:
        """Renders conversations as marked texts; each comes with True if it asks for an answer."""
        said = [{**(variables or {}), "messages": list(map(_normal, messages))} for messages, _ in asked]
        marked = [self._mark(each) for each in said]
        cut = [number for number, each in enumerate(said) if each != marked[number]]
        wanted = [*enumerate(marked), *((number, said[number]) for number in cut)]
        renders = [{**self._known, **each, "add_generation_prompt": asked[number][1]} for number, each in wanted]
        try:
            text = self.text if (variables or {}).get("tools") is None else self._tool_use
            texts = template_process.shared().render(text, renders)
        except ValueError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        for number, plain in zip(cut, texts[len(asked) :], strict=True):
            if texts[number].replace(_MARK, "") != plain:
                raise ValueError("it contains a special token's text, which the chat template changes.")
        return texts[: len(asked)]

    def _mark(self, value: Any) -> Any:
        """Returns the value with a mark inside each special token's text, so that it is not special any more."""
        if isinstance(value, str):
            if _MARK in value:
                raise ValueError("it has the character U+10FFFF, which is not text.")
            if found := [token for token in self._uncuttable if token in value]:
                raise ValueError(f"it has the special token {found[0]!r}, which cannot be distinguished from text.")
            edges = [0, *(match.start() + 1 for match in self._starts.finditer(value)), len(value)]
            return _MARK.join(value[start:end] for start, end in itertools.pairwise(edges))
        if isinstance(value, dict):
            return {self._mark(name): self._mark(inner) for name, inner in value.items()}
        return [self._mark(inner) for inner in value] if isinstance(value, list) else value


def _normal(message: Message) -> Message:
    """Returns a message without null fields, and with its thought under the names that templates read.

    As `transformers` does since version 5: templates fail on null, or write "None".
    """
    fields = {name: value for name, value in message.items() if value is not None}
    if thought := [fields[name] for name in _THOUGHTS if name in fields]:
        fields = {"thinking": thought[0], **fields, "reasoning_content": thought[0]}
    return fields


def is_in(folder: pathlib.Path) -> bool:
    """True if a tokenizer's folder has a chat template."""
    return (folder / _FILE).exists() or tokenizer_files.read(folder / tokenizer_files.CONFIG).get(_KEY) is not None


def parts(text: str) -> list[str]:
    """Splits a rendered text into parts: if they are encoded one by one, no special token comes from a message."""
    return text.split(_MARK)
