"""Calls of functions in a model's text, whole and as it is written."""

import json

import open_models
import pytest

from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.serving.answers import Answer
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
