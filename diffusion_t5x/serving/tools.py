"""Functions that a chat offers to a model, and the calls that it writes, in the form of Hermes and Qwen:

<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusion_t5x.decoding.json_schema import pattern_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.serving.refusals import Refusal

OPENS, _CLOSES = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"\s*{OPENS}(.*?){_CLOSES}\s*", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CHOICES = ("none", "auto", "required")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
      name: the function's.
      arguments: its arguments, a JSON object as text.
    """

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Tools:
    """The functions of a request.

    Attributes:
      param: the field that offers them.
      tools: OpenAI's descriptions, which the chat template shows to the model.
      required: functions of which the model must call one, by name; none if it is free to answer.
      most: maximum number of calls in an answer; None sets no limit.
    """

    param: ClassVar[str] = "tools"
    tools: Sequence[Mapping[str, Any]]
    required: tuple[str, ...] = ()
    most: int | None = None

    def pattern(self) -> str:
        """Returns the regular expression of a call of a function that is required.

        Raises:
          UserError: the parameters' schema cannot be kept.
        """
        functions = {tool["function"]["name"]: tool["function"] for tool in self.tools}
        calls = []
        for name in self.required:
            schema = functions[name].get("parameters") or {"type": "object", "properties": {}}
            if "properties" not in schema and schema.get("type") != "object":
                raise UserError(f'The schema of {name}\'s parameters must have "type": "object".')
            arguments = pattern_of(schema, f"The schema of {name}'s parameters")
            calls.append(rf'\{{"name": "{name}", "arguments": (?:{arguments})\}}')
        return f"{OPENS}\n(?:{'|'.join(calls)})\n{_CLOSES}"

    def split(self, text: str) -> tuple[str, list[Call]]:
        """Returns the text before the calls, and the calls; the whole text and none if they are not well-formed."""
        content, opens, rest = text.partition(OPENS)
        calls: list[Call] = []
        place, written = 0, opens + rest
        while place < len(written):
            found = _CALL.match(written, place)
            call = found and _parsed(found[1])
            if not found or not call:
                return text, []
            calls.append(call)
            place = found.end()
        return content, calls[: self.most]


def read(body: Mapping[str, Any]) -> Tools | None:
    """Reads `tools`, `tool_choice` and `parallel_tool_calls`; None if the model is to call nothing.

    Raises:
      Refusal: a field is wrong.
    """
    tools = body.get("tools", [])
    if not isinstance(tools, list):
        raise Refusal("tools must be a list.", "tools")
    names = [_name(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    if len({*names}) < len(names):
        raise Refusal("tools has two functions of one name.", "tools")
    parallel = body.get("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        raise Refusal("parallel_tool_calls must be true or false.", "parallel_tool_calls")
    choice = body.get("tool_choice", "auto" if tools else "none")
    if choice == "none" or (choice == "auto" and not tools):
        return None
    if choice == "auto":
        return Tools(tools, most=None if parallel else 1)
    named = _chosen(choice, names)
    return Tools(tools, required=tuple(named), most=1)


def _chosen(choice: Any, names: Sequence[str]) -> Sequence[str]:
    """Returns the functions of which one must be called."""
    if choice == "required":
        if not names:
            raise Refusal('tool_choice "required" needs tools.', "tool_choice")
        return names
    name = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = name.get("name") if isinstance(name, dict) else None
    if name is None:
        raise Refusal(
            f'tool_choice must be {", ".join(map(json.dumps, _CHOICES))} or {{"type": "function", "function": '
            '{"name": …}}.',
            "tool_choice",
        )
    if name not in names:
        raise Refusal("tool_choice names a function that is not among the tools.", "tool_choice")
    return [name]


def _name(tool: Any, where: str) -> str:
    """Returns the name of a tool's function."""
    given = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    function = given if isinstance(given, dict) else {}
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Refusal(
            f'{where} must be {{"type": "function", "function": {{"name": …}}}}; a name has up to 64 letters, digits, '
            '"_" and "-".',
            "tools",
        )
    if not isinstance(function.get("parameters"), dict | None):
        raise Refusal(f"{where}.function.parameters must be a JSON schema, an object.", "tools")
    return name


def _parsed(text: str) -> Call | None:
    """Returns the call in a pair of tags; None if it is not well-formed."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return Call(call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def with_arguments_parsed(message: Any, where: str) -> Any:
    """Returns a message whose calls have their arguments as objects, as chat templates read them; OpenAI's are texts.

    Raises:
      Refusal: a call is wrong.
    """
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not calls:
        return message
    try:
        return {**message, "tool_calls": [_with_arguments(call) for call in calls]}
    except (AttributeError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise Refusal(
            f'{where}.tool_calls must be a list of {{"function": {{"name": …, "arguments": a JSON object as text}}}}.',
            "messages",
        ) from error


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict) or not isinstance(function["name"], str):
        raise ValueError("not an object")
    return {**call, "function": {**function, "arguments": arguments}}
