"""Calls of functions in a model's text, whole and as it is written."""

import json
import random

import open_models
import pytest

from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.errors import UserError
from diffusion_t5x.serving import requests
from diffusion_t5x.serving.answers import Answer
from diffusion_t5x.serving.refusals import Refusal
from diffusion_t5x.serving.tools import Call, Tools
from diffusion_t5x.serving.worker import Writing, Written

TOOLS = Tools([{"type": "function", "function": {"name": "f"}}])


def call(arguments, name="f"):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


CASES = {
    "one": (call({"a": 1}), "", ['{"a": 1}']),
    "said before": ("Let me see.\n" + call({"a": "é </x>"}), "Let me see.\n", ['{"a": "é </x>"}']),
    "two": (f"{call({})}\n{call({'b': [1]})}\n", "", ["{}", '{"b": [1]}']),
    "tight": ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", ["{}"]),
    "none": ("a < b, <tool", "a < b, <tool", []),
    "not JSON": ("Hm. <tool_call>\n{name: f}\n</tool_call>", None, []),
    "not closed": ('<tool_call>\n{"name": "f", "arguments": {}}', None, []),
    "no object": (call([1]), None, []),
    "text after it": (call({}) + " That was it.", None, []),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_told_from_text(name, size, tmp_path):
    text, content, arguments = CASES[name]
    vocabulary = vocabulary_files.vocabulary(
        open_models.save_tokenizer(tmp_path, open_models.byte_level(), eos_token="<|end|>", pad_token="<|pad|>")
    )
    prompts = Prompts(vocabulary, False, None, 1, "decoder_only")
    tokens = [*vocabulary.encode(text), vocabulary.eos_id]
    answer, said = Answer(0, prompts, [], None, True, TOOLS), []
    for written in range(size, len(tokens) + size, size):
        is_end = written >= len(tokens)
        said.append(answer.add(Written(tokens, None) if is_end else Writing(tokens, written)))
    assert "".join(piece.text for piece in said) == (text if content is None else content)
    assert list(said[-1].calls) == [Call("f", each) for each in arguments]
    assert said[-1].finish_reason == ("tool_calls" if arguments else "stop")
    assert all(not piece.calls and piece.finish_reason is None for piece in said[:-1])


def test_at_most_so_many_calls():
    assert Tools(TOOLS.tools, most=1).split(call({}) + call({"a": 1})) == ("", [Call("f", "{}")])


def test_broken_tools_and_forms_are_refused_and_nothing_else():
    pytest.importorskip("outlines_core")
    rng = random.Random(0)
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    tool = {"type": "function", "function": function}
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": function["parameters"]}}
    whole = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [called]}],
        "tools": [tool, {**tool, "function": {"name": "g"}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    refused = 0
    for number in range(500):
        body = json.loads(json.dumps(whole if number % 2 else {"messages": whole["messages"], "response_format": form}))
        place = body
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if rng.random() < 0.3 or not isinstance(place[key], dict | list) or not place[key]:
                place[key] = rng.choice([None, 3, "", "{", [], {}, [None], {"type": "function"}, {"a": 1}])
                break
            place = place[key]
        try:
            asked = requests.chat(requests.parse(json.dumps(body).encode()))
            form_asked = asked.tools if asked.tools and asked.tools.required else asked.form
            assert form_asked is None or form_asked.pattern()
        except (Refusal, UserError):
            refused += 1
    assert 250 < refused < 500
