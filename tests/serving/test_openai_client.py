"""OpenAI's own client against a server: texts are those of `generate`, whole and in pieces."""

import dataclasses
import math

import live_server
import openai
import pytest

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder

PROMPT = "Once upon a time"
SAMPLED = AutoregressiveDecoder(temperature=1.0)


def text_of(pieces):
    return "".join(choice.text for piece in pieces for choice in piece.choices)


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == "stories" == client.models.retrieve("stories").id
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("else")


def test_a_completion_is_what_generate_writes(client, stories):
    done = client.completions.create(model="stories", prompt=PROMPT)
    assert done.choices[0].text == stories.generate(PROMPT, length=24)
    assert done.choices[0].finish_reason == "length" and done.object == "text_completion"
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(stories.tokenizer.encode(PROMPT)), 24)
    assert usage.total_tokens == usage.prompt_tokens + 24


def test_samples_of_several_prompts_are_those_of_generate_with_the_seed(client, stories):
    prompts = [PROMPT, "Lily", ""]
    done = client.completions.create(model="stories", prompt=prompts, n=2, seed=7, temperature=1)
    expected = stories.generate(prompts, decoder=SAMPLED, samples=2, seed=7, length=24)
    assert [choice.text for choice in done.choices] == [text for pair in expected for text in pair]
    assert [choice.index for choice in done.choices] == list(range(6))
    assert all(one != other for one, other in expected)


def test_without_a_seed_samples_differ_from_request_to_request(client):
    texts = {client.completions.create(model="stories", prompt=PROMPT, temperature=1).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def test_token_ids_are_a_prompt(client, stories):
    ids = list(stories.tokenizer.encode(PROMPT))
    for prompt in (ids, [ids]):
        done = client.completions.create(model="stories", prompt=prompt)
        assert done.choices[0].text == stories.generate(PROMPT, length=24)


def test_pieces_joined_are_the_whole(client, stories):
    stream = client.completions.create(
        model="stories", prompt=PROMPT, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = list(stream)
    assert text_of(pieces) == stories.generate(PROMPT, length=24)
    assert len(pieces) >= 5 and pieces[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == 24


def test_pieces_of_several_answers_name_theirs(client, stories):
    stream = client.completions.create(model="stories", prompt=[PROMPT, "Tom"], n=2, seed=1, stream=True, temperature=1)
    texts = [""] * 4
    for piece in stream:
        texts[piece.choices[0].index] += piece.choices[0].text
    expected = stories.generate([PROMPT, "Tom"], decoder=SAMPLED, samples=2, seed=1, length=24)
    assert texts == [text for pair in expected for text in pair]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_string(client, stories, stream):
    whole = stories.generate(PROMPT, length=24)
    stop = whole[15:19]
    done = client.completions.create(model="stories", prompt=PROMPT, stop=["never there", stop], stream=stream)
    pieces = list(done) if stream else [done]
    assert text_of(pieces) == whole[: whole.index(stop)] and pieces[-1].choices[0].finish_reason == "stop"
    if not stream:
        assert done.usage.completion_tokens < 24


def test_log_probabilities_sum_to_the_likelihood(client, stories):
    done = client.completions.create(model="stories", prompt=PROMPT, logprobs=3)
    scores = done.choices[0].logprobs
    assert "".join(scores.tokens) == done.choices[0].text and scores.text_offset[:2] == [0, len(scores.tokens[0])]
    assert math.isclose(sum(scores.token_logprobs), stories.trace(PROMPT, length=24).record["score"], abs_tol=1e-3)
    assert all(
        math.isclose(max(likely.values()), score, abs_tol=1e-4)
        for likely, score in zip(scores.top_logprobs, scores.token_logprobs, strict=True)
    )
    assert all(len(likely) <= 3 for likely in scores.top_logprobs)


@pytest.mark.parametrize(
    "decoder",
    [
        BlockDecoder(4, MaskedDecoder(num_steps=2, temperature=1.0)),
        pytest.param(SundaeDecoder(num_steps=3, num_samples=1), marks=pytest.mark.slow),
        pytest.param(BeamSearchDecoder(), marks=pytest.mark.slow),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
def test_other_decoders_write_what_they_write_alone(decoder, stories):
    with live_server.live(live_server.loaded(stories, decoder)) as url:
        client = live_server.client(url)
        prompts = [PROMPT, "Lily and Tom"]
        expected = dataclasses.replace(stories, allow_mismatch=True).generate(
            prompts, decoder=decoder, seed=3, length=24
        )
        stream = client.completions.create(
            model="stories", prompt=prompts, seed=3, stream=True,
            extra_body={"stream_options": {"include_canvas": True}},
        )  # fmt: skip
        texts, canvases = ["", ""], []
        for piece in stream:
            choice = piece.choices[0]
            texts[choice.index] += choice.text
            canvases.append(choice.canvas)
        assert texts == expected
        assert all(canvases) and (len(canvases) > 2 or isinstance(decoder, BeamSearchDecoder))
        with pytest.raises(openai.BadRequestError, match="no exact log-probabilities"):
            client.completions.create(model="stories", prompt=PROMPT, logprobs=1)
        if isinstance(decoder, BeamSearchDecoder):
            with pytest.raises(openai.BadRequestError, match="has no temperature"):
                client.completions.create(model="stories", prompt=PROMPT, temperature=0.5)
