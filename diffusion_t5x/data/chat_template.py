"""A model's chat template, the Jinja that comes with its tokenizer: conversations as texts, turn by turn.

Whoever made a model wrote its template, so it runs in Jinja's sandbox and sees plain JSON.
"""

import datetime
import itertools
import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, Self

import jinja2.ext
import jinja2.sandbox

from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.errors import UserError

Message = Mapping[str, Any]

_MARK = "\U0010ffff"  # Unicode keeps it for a program's own use
_TOKENS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class ChatTemplate:
    """Renders conversations as `transformers` does, but that nothing in a message becomes a special token.

    Args:
      text: the template.
      tokens: what it may name: "bos_token", "eos_token" ...
      special: texts that a tokenizer makes special tokens, wherever they stand.
      variables: what else it may name, such as {"enable_thinking": False}.

    Raises:
      UserError: it is no Jinja.
    """

    def __init__(
        self,
        text: str,
        tokens: Mapping[str, str],
        special: Collection[str],
        variables: Mapping[str, Any] | None = None,
    ):
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateError as error:
            raise UserError(f"The chat template is no Jinja that is known here: {error}.") from error
        self._known = {"tools": None, "documents": None, **tokens, **(variables or {})}
        longest_first = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"
        self._special = re.compile(longest_first)
        self._starts = re.compile(f"(?={longest_first})")  # of those that overlap, too
        self._uncuttable = [token for token in special if len(token) == 1]

    @classmethod
    def read(cls, folder: pathlib.Path, special: Collection[str], variables: Mapping[str, Any] | None = None) -> Self:
        """The template of a tokenizer's folder: chat_template.jinja, else "chat_template" in tokenizer_config.json.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        file = folder / tokenizer_files.CONFIG
        config = tokenizer_files.read(file)
        text = config.get("chat_template")
        if isinstance(text, list):  # several by name
            if not all(isinstance(named, dict) and {"name", "template"} <= named.keys() for named in text):
                raise UserError(f'{file}: each template in chat_template should have a "name" and a "template".')
            text = {str(named["name"]): named["template"] for named in text}.get("default")
        try:
            text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read {folder / 'chat_template.jinja'}: {error}.") from error
        if not isinstance(text, str):
            raise UserError(
                f"{folder} has no chat template: neither chat_template.jinja nor a chat_template in "
                "tokenizer_config.json. Is it the folder of a chat model?"
            )
        tokens = {name: token for name in _TOKENS if (token := tokenizer_files.token_text(config, name, file))}
        return cls(text, tokens, special, variables)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation, at whose end the assistant's turn may begin.

        Where a message has the text of a special token, `parts` finds a cut.

        Raises:
          ValueError: the template refuses the conversation or fails.
        """
        marked = self._mark(messages)
        text = self._run(marked, add_generation_prompt)
        if marked != messages and text.replace(_MARK, "") != self._run(messages, add_generation_prompt):
            raise ValueError("it has the text of a special token, which the chat template does not leave as it is.")
        return text

    def turn(self, messages: Sequence[Message], number: int) -> tuple[str, str]:
        """What the model reads before it writes `messages[number]`, and what it then writes.

        That ends with the last special token behind the message; what a template puts after it, such as a line end,
        begins what is read next.

        Raises:
          ValueError: as `render`, or the template begins a turn otherwise than it asks for one.
        """
        prompt = self.render(messages[:number], add_generation_prompt=True)
        text = self.render(messages[: number + 1])
        if not text.startswith(prompt):
            raise ValueError(
                f"the chat template asks for message {number + 1} with {prompt[-40:]!r}, but writes it otherwise."
            )
        answer = text[len(prompt) :]
        ends = [special.end() for special in self._special.finditer(answer)]
        return prompt, answer[: ends[-1]] if ends else answer

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._known)
        except Exception as error:  # a template can fail in any way
            raise ValueError(f"the chat template does not take it: {error}") from error

    def _mark(self, value: Any) -> Any:
        """The same with a mark inside each special token's text, which so is not one any more."""
        if isinstance(value, str):
            if _MARK in value:
                raise ValueError("it has the character U+10FFFF, which is no text.")
            if found := [token for token in self._uncuttable if token in value]:
                raise ValueError(f"it has the special token {found[0]!r}, which cannot be told from text.")
            edges = [0, *(match.start() + 1 for match in self._starts.finditer(value)), len(value)]
            return _MARK.join(value[start:end] for start, end in itertools.pairwise(edges))
        if isinstance(value, dict):
            return {name: self._mark(inner) for name, inner in value.items()}
        return [self._mark(inner) for inner in value] if isinstance(value, list) else value


def parts(text: str) -> list[str]:
    """The parts of a rendered text: encoded one by one, no special token comes from a message."""
    return text.split(_MARK)


class _Generation(jinja2.ext.Extension):
    """{% generation %}, with which some templates mark what the assistant says."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Jinja as `transformers` sets it up."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
