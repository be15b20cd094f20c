"""/v1/chat/completions with a chat template: a random model answers as `generate --chat` would."""

import dataclasses

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
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.serving.assembly import Loaded

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Once upon a time?"},
    {"role": "assistant", "content": "A small model."},
    {"role": "user", "content": "It learned"},
]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    vocabulary = vocabulary_files.vocabulary(chats.save(tmp_path_factory.mktemp("talker"), "chatml"))
    chat = Chat.of(vocabulary)
    config = ModelConfig(embed_dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32, position="rotary")
    definition = ModelDefinition(config, dataclasses.replace(token_ids(vocabulary), end_ids=chat.end_ids))
    mesh = MeshConfig().make(jax.devices()[:1])
    prompts = Prompts(vocabulary, False, None, 20, "decoder_only", chat)
    decoder = AutoregressiveDecoder(temperature=1.0)
    return Loaded("talker", mesh, definition, tiny.random_params(definition), prompts, decoder)


@pytest.fixture(scope="module")
def url(talker):
    with live_server.live(talker, dataclasses.replace(live_server.LIMITS, context=256)) as url:
        yield url


@pytest.fixture(scope="module")
def expected(talker):
    """The answers of three samples with seed 5."""
    answers = Answers(talker.mesh, talker.definition, talker.params, talker.decoder, seed=5)
    row = talker.prompts.answering(TALK, 0)
    return [talker.prompts.to_text(answers.write(row, sample).tokens) for sample in range(3)]


def test_answers_are_those_of_the_template(client, expected):
    done = client.chat.completions.create(model="talker", messages=TALK, seed=5, n=3)
    assert [choice.message.content for choice in done.choices] == expected and len({*expected}) == 3
    assert done.object == "chat.completion" and {choice.message.role for choice in done.choices} == {"assistant"}


def test_pieces_joined_are_the_answers(client, expected):
    stream = client.chat.completions.create(model="talker", messages=TALK, seed=5, n=3, stream=True)
    texts, roles, reasons = [""] * 3, [None] * 3, [None] * 3
    for piece in stream:
        (choice,) = piece.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] = roles[choice.index] or choice.delta.role
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == expected and roles == ["assistant"] * 3 and set(reasons) <= {"stop", "length"}


def test_parts_of_text_are_one_text(client):
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "learned"}]
    ask = {"model": "talker", "seed": 5, "max_tokens": 20}
    whole = client.chat.completions.create(messages=TALK, **ask)
    in_parts = client.chat.completions.create(messages=[*TALK[:-1], {"role": "user", "content": parts}], **ask)
    assert whole.choices[0].message.content == in_parts.choices[0].message.content
    assert whole.usage == in_parts.usage


def test_log_probabilities_of_an_answer(client, expected, talker):
    done = client.chat.completions.create(
        model="talker", messages=TALK, seed=5, logprobs=True, top_logprobs=2, stream=False
    )
    tokens = done.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace") == expected[0]
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)
    assert all(token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob for token in tokens)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "no role"}]}, "message 1 has the role null"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has the content null, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is read"),
        ({"messages": [{"role": "user", "content": "a" * 3000}]}, "Nothing is truncated"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "knows no tools"),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"max_completion_tokens": 0}, "at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(client, given, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": "talker", "messages": TALK, **given})


def test_a_model_without_a_template_takes_no_chats(stories):
    with live_server.live(live_server.loaded(stories)) as url:
        client = live_server.client(url)
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(model="stories", messages=TALK)


@pytest.mark.slow
def test_an_encoder_decoder_reads_prompts_apart(talker):
    config = dataclasses.replace(talker.definition.config, architecture="encoder_decoder", tie_embeddings=False)
    definition = ModelDefinition(config, talker.definition.vocabulary)
    prompts = dataclasses.replace(talker.prompts, architecture="encoder_decoder", chat=None, adds_eos=True)
    model = dataclasses.replace(
        talker, definition=definition, params=tiny.random_params(definition), prompts=prompts, name="apart"
    )
    answers = Answers(model.mesh, definition, model.params, model.decoder, seed=5)
    expected = [prompts.to_text(answers.write(prompts.batch("It learned", 0), n).tokens) for n in range(2)]
    with live_server.live(model) as url:
        client = live_server.client(url)
        done = client.completions.create(model="apart", prompt="It learned", seed=5, n=2, logprobs=0)
        assert [choice.text for choice in done.choices] == expected and len({*expected}) == 2
        assert done.usage.prompt_tokens == len(prompts.vocabulary.encode("It learned")) + 1
        with pytest.raises(openai.BadRequestError, match="takes 96 tokens of each, and 96 of the prompt"):
            client.completions.create(model="apart", prompt="a" * 300)
