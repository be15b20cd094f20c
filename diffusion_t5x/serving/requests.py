"""Reads the bodies of OpenAI's requests: checks every field, and refuses what would change the answer unheard."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x.errors import did_you_mean
from diffusion_t5x.serving import forms, tools
from diffusion_t5x.serving.forms import Form
from diffusion_t5x.serving.refusals import Refusal
from diffusion_t5x.serving.tools import Tools

Body = Mapping[str, Any]
Prompt = str | list[int]

MOST_TEXTS = 128  # of one request
MOST_STOPS = 16
MOST_ALTERNATIVES = 20  # log-probabilities for each token
SAMPLING = ("temperature", "top_p", "top_k")
_MOST_SEED = 2**31 - 1

# They change no text: they are for accounts, caches, billing, speed.
_HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "prediction",
}
# Values with which these fields change nothing. All others are refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
_COMMON = {
    *("model", "max_tokens", "n", "seed", "stop", "stream", "stream_options", "logprobs"),
    *("response_format", "structured_outputs"),
    *SAMPLING,
}
_STREAM_OPTIONS = {"include_usage", "include_canvas", "include_obfuscation"}
_COMPLETION = _COMMON | {"prompt", "best_of"}
_CHAT = _COMMON | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request's settings; None leaves one to the server.

    Attributes:
      prompts: texts or token ids; empty for a chat.
      messages: the conversation of a chat; None for a completion.
      model: the model's name.
      n: number of answers to each prompt.
      seed: random seed.
      max_tokens: maximum number of tokens of an answer; for diffusion, the size of the canvas.
      stop: strings before which an answer ends.
      form: what an answer may be; None: any text.
      tools: functions that the model may call; None: it calls none.
      sampling: settings of the decoder, of those in `SAMPLING`.
      alternatives: number of likely tokens to list for each token, besides its own log-probability; None lists neither.
      stream: send pieces as they are written.
      include_usage: count tokens in the last piece.
      include_canvas: send the canvas after each step, too.
    """

    prompts: Sequence[Prompt]
    messages: Sequence[Mapping[str, Any]] | None
    model: str | None
    n: int
    seed: int | None
    max_tokens: int | None
    stop: tuple[str, ...]
    form: Form | None
    tools: Tools | None
    sampling: Mapping[str, float | int]
    alternatives: int | None
    stream: bool
    include_usage: bool
    include_canvas: bool


def parse(content: bytes) -> Body:
    """Parses a request's JSON.

    Raises:
      Refusal: it is not a JSON object.
    """
    try:
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False).encode()  # no halves of characters
    except (ValueError, RecursionError) as error:
        raise Refusal(f"The request's body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise Refusal("The request's body must be a JSON object.")
    return {name: value for name, value in body.items() if value is not None}


def completion(body: Body) -> Ask:
    """Reads the body of /v1/completions.

    Raises:
      Refusal: a field is wrong, or the server cannot honour it.
    """
    _check_names(body, _COMPLETION)
    ask = _common(body, _prompts(body.get("prompt")), None, _integer(body, "max_tokens", 1))
    if (best_of := _integer(body, "best_of", 1)) is not None and best_of != ask.n:
        raise Refusal(f"best_of must equal n, {ask.n}: this server ranks no answers.", "best_of")
    return dataclasses.replace(ask, alternatives=_integer(body, "logprobs", 0, MOST_ALTERNATIVES))


def chat(body: Body) -> Ask:
    """Reads the body of /v1/chat/completions.

    Raises:
      Refusal: a field is wrong, or the server cannot honour it.
    """
    _check_names(body, _CHAT)
    lengths = {name: _integer(body, name, 1) for name in ("max_completion_tokens", "max_tokens")}
    most = next((value for value in lengths.values() if value is not None), None)
    ask = _common(body, [], _messages(body.get("messages")), most)
    offered = tools.read(body)
    if offered and ask.form:
        raise Refusal(
            f'{ask.form.param} rules out calls of tools: leave it out, or set tool_choice to "none".', "tools"
        )
    if offered and offered.required and ask.stop:
        raise Refusal("stop would cut the call that tool_choice asks for: leave it out.", "stop")
    ask = dataclasses.replace(ask, tools=offered)
    alternatives = _integer(body, "top_logprobs", 0, MOST_ALTERNATIVES)
    if not _flag(body, "logprobs"):
        if alternatives is not None:
            raise Refusal("top_logprobs needs logprobs: true.", "top_logprobs")
        return ask
    return dataclasses.replace(ask, alternatives=alternatives or 0)


def _common(
    body: Body, prompts: Sequence[Prompt], messages: Sequence[Mapping[str, Any]] | None, max_tokens: int | None
) -> Ask:
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not options.keys() <= _STREAM_OPTIONS:
        raise Refusal('stream_options may have "include_usage" and "include_canvas".', "stream_options")
    if options and not _flag(body, "stream"):
        raise Refusal("stream_options needs stream: true.", "stream_options")
    sampling = {
        "temperature": _number(body, "temperature", 0, 100),
        "top_p": _number(body, "top_p", 0, 1),
        "top_k": _integer(body, "top_k", 1),
    }
    if sampling["top_p"] == 0:
        raise Refusal("top_p must be above 0.", "top_p")
    n = _integer(body, "n", 1) or 1
    if (texts := n * max(1, len(prompts))) > MOST_TEXTS:
        raise Refusal(f"The request asks for {texts} texts; {MOST_TEXTS} are allowed.", "n")
    stop, form = _stop(body.get("stop", [])), forms.read(body)
    if stop and form:
        raise Refusal(f"stop would cut the text that {form.param} asks for: leave it out.", "stop")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise Refusal("model must be a string.", "model")
    return Ask(
        prompts=prompts,
        messages=messages,
        model=model,
        n=n,
        seed=_integer(body, "seed", 0, _MOST_SEED),
        max_tokens=max_tokens,
        stop=stop,
        form=form,
        tools=None,
        sampling={name: value for name, value in sampling.items() if value is not None},
        alternatives=None,
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        include_canvas=_flag(options, "include_canvas"),
    )


def _check_names(body: Body, known: set[str]) -> None:
    for name in body.keys() - known - _HARMLESS:
        if name not in _NEUTRAL:
            hint = did_you_mean(name, known | _HARMLESS)
            raise Refusal(f"Unknown field {name[:40]!a}.{hint}", name if name.isascii() else None)
        if body[name] not in _NEUTRAL[name]:
            raise Refusal(f"{name} is not supported by this server: leave it out.", name)


def _prompts(given: Any) -> list[Prompt]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if _are_ids(given):
            return [given]
        if all(isinstance(each, str) or (isinstance(each, list) and each and _are_ids(each)) for each in given):
            return given
    raise Refusal("prompt must be a string, a list of strings, a list of token ids, or a list of such lists.", "prompt")


def _are_ids(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _messages(given: Any) -> list[Mapping[str, Any]]:
    if not isinstance(given, list) or not given:
        raise Refusal("messages must be a list of at least one message.", "messages")
    return [tools.with_arguments_parsed(message, f"messages[{number}]") for number, message in enumerate(given)]


def _stop(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refusal("stop must be a string, or a list of strings, that are not empty.", "stop")
    if len(stops) > MOST_STOPS:
        raise Refusal(f"stop has {len(stops)} strings; {MOST_STOPS} are allowed.", "stop")
    return tuple(stops)


def _integer(body: Body, name: str, least: int, most: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise Refusal(f"{name} must be an integer, at least {least}{upper}.", name)
    return value


def _number(body: Body, name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:  # NaN, too
        raise Refusal(f"{name} must be a number in [{least:g}, {most:g}].", name)
    return float(value)


def _flag(body: Body, name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(f"{name} must be true or false.", name)
    return value
