"""Requests that are not answered: each ends in the right status, and the server goes on."""

import dataclasses
import http.client
import json
import random
import re
import urllib.parse

import live_server
import pytest
from live_server import wait_for

from diffusion_t5x.serving import requests

PROMPT = "Once upon a time"
JSON = {"Content-Type": "application/json"}


def ask(url, path="/v1/completions", body=b"", method="POST", headers=JSON):
    """Sends a request as it is; gives status, headers and parsed body."""
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def refusal(url, body, **options):
    status, _, content = ask(url, body=body, **options)
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"].endswith((".", "?"))
    return status, error


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({"prompt": None}, 400, "prompt must be a string"),
        ({"prompt": []}, 400, "prompt must be a string"),
        ({"prompt": [1, 10_000]}, 400, "token id 10000; the model's are 0 to 511"),
        ({"prompt": "a" * 200}, 400, "Nothing is cut"),
        ({"prompt": "\ud800"}, 400, "not JSON"),
        ({"model": "gpt-5"}, 404, "There is no model 'gpt-5' here"),
        ({"model": 3}, 400, "model must be a string"),
        ({"max_tokens": 0}, 400, "max_tokens must be an integer, at least 1"),
        ({"max_tokens": 97}, 400, "the answer may have 97"),
        ({"max_tokens": 10**12}, 400, "the answer may have 1000000000000"),
        ({"max_tokens": 2**70}, 400, "the answer may have 1180591620717411303424"),
        ({"max_tokens": 1e400}, 400, "not JSON|max_tokens must be an integer"),
        ({"n": 1.5}, 400, "n must be an integer"),
        ({"n": 129}, 400, "129 texts; 128 are allowed"),
        ({"n": 13}, 400, "13 texts; this server holds 12"),
        ({"n": 2, "best_of": 3}, 400, "best_of must equal n, 2"),
        ({"seed": -1}, 400, "seed must be an integer, at least 0"),
        ({"stop": [""]}, 400, "stop must be a string"),
        ({"stop": [str(n) for n in range(17)]}, 400, "17 strings; 16 are allowed"),
        ({"stream": 1}, 400, "stream must be true or false"),
        ({"stream_options": {"include_usage": True}}, 400, "needs stream"),
        ({"stream": True, "stream_options": {"else": True}}, 400, "stream_options may have"),
        ({"temperature": -1}, 400, r"temperature must be a number in \[0, 100\]"),
        ({"temperature": float("nan")}, 400, "temperature must be a number"),
        ({"top_p": 0}, 400, "top_p must be above 0"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
        ({"echo": True}, 400, "echo is not supported"),
        ({"suffix": "end"}, 400, "suffix is not supported"),
        ({"temprature": 1}, 400, "Unknown field 'temprature'. Did you mean 'temperature'"),
        ({"\ud7ff\u2028": 1}, 400, "Unknown field"),
    ],
    ids=lambda value: next(iter(value)).encode("ascii", "replace").decode() if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said(url, given, status, message):
    found, error = refusal(url, {"prompt": PROMPT, **given})
    assert found == status and re.search(message, error["message"])


def test_fields_that_change_nothing_are_accepted(url):
    given = {
        "prompt": PROMPT, "user": "me", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": None,
        "echo": False, "best_of": 1, "suffix": None, "logprobs": None, "max_tokens": 24,
    }  # fmt: skip
    assert ask(url, body=given)[0] == 200


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"path": "/v1/else"}, 404),
        ({"method": "GET"}, 405),
        ({"headers": {"Content-Type": "text/plain"}}, 415),
        ({"headers": {}}, 415),
    ],
    ids=str,
)
def test_other_requests_are_refused(url, options, status):
    assert refusal(url, {"prompt": PROMPT}, **options)[0] == status


def test_a_request_that_is_too_large_is_refused_before_it_is_read(url):
    assert refusal(url, b" " * 20_001)[0] == 413
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    chunks = (b" " * 1000 for _ in range(1000))  # no Content-Length tells its size
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        connection.request("POST", "/v1/completions", chunks, JSON, encode_chunked=True)
        assert connection.getresponse().status == 413
        raise BrokenPipeError
    assert ask(url, "/health", method="GET")[0] == 200


@pytest.fixture(scope="module")
def small(stories):
    """A server with one slot, room for one more text, and a key."""
    limits = dataclasses.replace(live_server.LIMITS, slots=1, queue=1, context=500)
    with live_server.live(live_server.loaded(stories), limits, api_key="täst key") as url:
        yield url


def test_without_the_key_there_is_no_answer(small):
    for headers in ({}, {"Authorization": "Bearer else"}, {"Authorization": "Bearer "}):
        status, found, content = ask(small, body={"prompt": PROMPT}, headers={**JSON, **headers})
        assert status == 401 and found["WWW-Authenticate"] == "Bearer"
        assert json.loads(content)["error"]["code"] == "invalid_api_key"
        assert ask(small, "/v1/models", method="GET", headers=headers)[0] == 401
    assert {ask(small, path, method="GET")[0] for path in ("/", "/health", "/metrics")} == {200}
    key = {"Authorization": "Bearer täst key".encode()}
    assert ask(small, body={"prompt": PROMPT, "max_tokens": 2}, headers={**JSON, **key})[0] == 200


def test_a_full_queue_says_when_to_come_back(small):
    key = {**JSON, "Authorization": "Bearer täst key".encode()}
    place = urllib.parse.urlsplit(small)
    busy = [http.client.HTTPConnection(place.hostname, place.port, timeout=60) for _ in range(2)]
    for connection in busy:
        body = json.dumps({"prompt": PROMPT, "max_tokens": 480, "stream": True}).encode()
        connection.request("POST", "/v1/completions", body, key)
    wait_for(lambda: b"diffusion_t5x_texts_waiting 1.0" in ask(small, "/metrics", method="GET")[2])
    status, headers, content = ask(small, body={"prompt": PROMPT}, headers=key)
    assert status == 429 and 1 <= int(headers["Retry-After"]) <= 60
    assert json.loads(content)["error"]["code"] == "rate_limit_exceeded"
    for connection in busy:
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
    assert ask(small, body={"prompt": PROMPT, "max_tokens": 2}, headers=key)[0] == 200


def broken(rng):
    """A request's body that is broken at random: in its bytes, its fields, or its values."""
    values = [
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        "\ud800",
        "é" * 50,
        [],
        [[]],
        {},
        {"a": {}},
        [None],
        [-1],
        [1.5],
        ["", 1],
    ]
    fields = [*requests._COMPLETION, *requests._CHAT, *requests._NEUTRAL, "else", "stream_options", "\0"]
    body = {"prompt": PROMPT, "messages": [{"role": "user", "content": PROMPT}], "stream_options": 3}
    for _ in range(rng.randint(1, 4)):
        body[rng.choice(fields)] = rng.choice(values)
    content = json.dumps(body).encode()
    kind = rng.randrange(4)
    if kind == 0:
        content = content[: rng.randrange(len(content))]
    elif kind == 1:
        place = rng.randrange(len(content))
        content = content[:place] + rng.randbytes(3) + content[place:]
    elif kind == 2:
        content = rng.choice(
            [b"[" * 9000, b'{"n":' * 3000, b"9" * 9999, b"\xff\xfe{}", b"null", b"[]", b'{"prompt": NaN}']
        )
    return content


def test_200_broken_requests_end_in_4xx_and_none_in_500(url):
    rng = random.Random(0)
    statuses = [ask(url, rng.choice(["/v1/completions", "/v1/chat/completions"]), broken(rng))[0] for _ in range(200)]
    assert {status // 100 for status in statuses} == {4}, sorted(set(statuses))
    assert ask(url, body={"prompt": PROMPT, "max_tokens": 24})[0] == 200
    assert b"diffusion_t5x_texts_running 0.0" in ask(url, "/metrics", method="GET")[2]
