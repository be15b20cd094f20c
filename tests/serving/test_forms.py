"""Structured output and tools over HTTP: texts keep to their form, and are what `generate` writes with it."""

import dataclasses
import json

import chats
import jax
import live_server
import openai
import pytest
import tiny

from diffusion_t5x.chat.answers import Answers
from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.structured import language_of
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.serving.assembly import Loaded

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("outlines_core")

ASKED = [{"role": "user", "content": "Once upon a time?"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer"}},
    "required": ["kind", "age"],
}
FORM = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": SCHEMA}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "what-time", "description": "Tells the time."}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"kind": "cat"}'}}


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    vocabulary = vocabulary_files.vocabulary(chats.save(tmp_path_factory.mktemp("forms"), "chatml", chats.TOOLS))
    chat = Chat.of(vocabulary)
    config = ModelConfig(embed_dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32, position="rotary")
    definition = ModelDefinition(config, dataclasses.replace(token_ids(vocabulary), end_ids=chat.end_ids))
    prompts = Prompts(vocabulary, False, None, 60, "decoder_only", chat)
    decoder = AutoregressiveDecoder(temperature=1.0)
    mesh = MeshConfig().make(jax.devices()[:1])
    return Loaded("talker", mesh, definition, tiny.random_params(definition), prompts, decoder)


@pytest.fixture(scope="module")
def url(talker):
    with live_server.live(talker, dataclasses.replace(live_server.LIMITS, context=600)) as url:
        yield url


@pytest.fixture
def chat(client):
    def ask(**given):
        return client.chat.completions.create(**{"model": "talker", "messages": ASKED, "seed": 5, **given})

    return ask


def alone(talker, sample, **form):
    """The answer of `generate` with a form."""
    language = language_of(
        form.get("regex"), form.get("schema"), talker.prompts.vocabulary, end_ids=talker.prompts.end_ids
    )
    answers = Answers(talker.mesh, talker.definition, talker.params, talker.decoder.within(language), seed=5)
    return talker.prompts.to_text(answers.write(talker.prompts.answering(ASKED, 0), sample).tokens)


@pytest.mark.slow
def test_answers_of_a_schema_are_those_of_generate(chat, client, talker):
    done = chat(response_format=FORM, n=3)
    texts = [choice.message.content for choice in done.choices]
    assert texts == [alone(talker, sample, schema=SCHEMA) for sample in range(3)] and len({*texts}) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert {choice.finish_reason for choice in done.choices} == {"stop"}
    plain = [chat(response_format=form).choices[0].message.content for form in ({"type": "text"}, openai.omit)]
    assert plain[0] == plain[1] != texts[0]


def test_each_answer_has_its_own_form(client, chat):
    ask = {"model": "talker", "prompt": "a", "max_tokens": 60, "seed": 5}
    found = client.completions.create(**ask, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}, n=2)
    assert all(len(choice.text) == 3 and choice.text.isdigit() for choice in found.choices)
    any_object = chat(response_format={"type": "json_object"}).choices[0].message.content
    assert isinstance(json.loads(any_object), dict)
    stream = chat(response_format=FORM, stream=True)
    jsonschema.validate(json.loads("".join(piece.choices[0].delta.content or "" for piece in stream)), SCHEMA)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"response_format": {"type": "xml"}}, 'type "text", "json_object" or "json_schema"'),
        ({"response_format": "json"}, 'type "text", "json_object" or "json_schema"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, 'an object with a "schema"'),
        ({"extra_body": {"structured_outputs": {"regex": "["}}}, "is refused"),
        ({"extra_body": {"structured_outputs": {"choice": ["a"]}}}, "structured_outputs must be"),
        ({"response_format": FORM, "extra_body": {"structured_outputs": {"regex": "a"}}}, "not both"),
        ({"response_format": FORM, "max_tokens": 3}, "No text of .* fits 3 tokens.* larger max_tokens"),
        ({"response_format": FORM, "stop": "a"}, "stop would cut the text that response_format asks for"),
        ({"response_format": FORM, "tools": [WEATHER]}, "response_format rules out calls of tools"),
        ({"tools": [WEATHER, WEATHER]}, "two functions of one name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r"tools\[0\] must be"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, r"tools\[0\] must be"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "parameters must be a JSON"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
                "tool_choice": "required",
            },
            'f\'s parameters must have "type": "object"',
        ),
        ({"tools": [WEATHER], "tool_choice": "any"}, 'tool_choice must be "none", "auto", "required" or'),
        ({"tool_choice": "required"}, "needs tools"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "not among the tools",
        ),
        ({"tools": [WEATHER], "tool_choice": "required", "max_tokens": 5}, "No text of .* fits 5 tokens"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, 'has the role "asistant".*Did you mean'),
        (
            {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
            r"messages\[1\].tool_calls must be",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_wrong_is_said(chat, given, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chat(**given)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 3},
        {"$ref": "#/nowhere"},
        {"type": "object", "properties": 5},
        {"type": "string", "minLength": 5, "maxLength": 2},
    ],
    ids=str,
)
def test_schemas_that_cannot_be_kept_are_refused(chat, schema):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError):
        chat(response_format=form)


def test_a_decoder_that_takes_no_form_refuses_it(talker):
    model = dataclasses.replace(talker, decoder=BeamSearchDecoder(num_beams=2))
    with live_server.live(model) as url, pytest.raises(openai.BadRequestError, match="BeamSearchDecoder"):
        client = live_server.client(url)
        client.completions.create(
            model="talker", prompt="a", extra_body={"structured_outputs": {"regex": "a"}}, max_tokens=4
        )


def test_tools_are_shown_to_the_model_and_results_are_read(chat, talker):
    def number(messages, **variables):
        return len(talker.prompts.chat.prompt_ids(messages, variables))

    assert chat(tools=[WEATHER]).usage.prompt_tokens == number(ASKED, tools=[WEATHER]) > number(ASKED)
    assert chat(tools=[WEATHER], tool_choice="none").usage.prompt_tokens == number(ASKED)
    said = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALLED]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "It rains."}]}
    parsed = {**CALLED, "function": {"name": "weather", "arguments": {"kind": "cat"}}}
    expected = number([ASKED[0], {"role": "assistant", "tool_calls": [parsed]}, {**result, "content": "It rains."}])
    assert chat(messages=[*said, result]).usage.prompt_tokens == expected


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call_that_must_be_made_is_made(chat, choice):
    asked = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "n": 4, "max_tokens": 120}
    done = chat(**asked)
    for answer in done.choices:
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and answer.message.content is None and call.id
        if call.function.name == "weather":
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        else:
            assert choice == "required" and json.loads(call.function.arguments) == {}
    found = {}
    for piece in chat(**asked, stream=True):
        delta = piece.choices[0].delta
        assert not delta.content
        for call in delta.tool_calls or []:
            assert call.index == 0
            found[piece.choices[0].index] = (call.function.name, call.function.arguments)
    calls = [answer.message.tool_calls[0].function for answer in done.choices]
    assert [found[number] for number in range(4)] == [(call.name, call.arguments) for call in calls]
