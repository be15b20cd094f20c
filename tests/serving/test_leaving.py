"""Clients that leave free their slots, and a signal ends a server when it has answered."""

import dataclasses
import http.client
import json
import pathlib
import re
import shlex
import signal
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import live_server
import openai
import pytest
from live_server import Verb, numbers, wait_for
from pages import by_module
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from diffusion_t5x import serve
from diffusion_t5x.errors import UserError
from diffusion_t5x.serving.server import Server

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "serving.md"
TAKEN = socket.create_server(("127.0.0.1", 0))
PROMPT = "Once upon a time"
BODY = {"prompt": PROMPT, "max_tokens": 400}


def begin(url, **body):
    """Sends a request, and gives its connection."""
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    content = json.dumps({**BODY, **body}).encode()
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    return connection


@pytest.fixture(scope="module")
def url(stories):
    limits = dataclasses.replace(live_server.LIMITS, slots=2, queue=4, context=500)
    with live_server.live(live_server.loaded(stories), limits) as url:
        yield url


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(url, stream):
    before = numbers(url).get('diffusion_t5x_requests_total{endpoint="completions",status="499"}', 0)
    connections = [begin(url, stream=stream) for _ in range(4)]  # two of them wait
    wait_for(lambda: numbers(url)["diffusion_t5x_texts_waiting"] == 2)
    for connection in connections:
        connection.close()
    wait_for(lambda: numbers(url)["diffusion_t5x_texts_running"] == 0)
    after = numbers(url)
    assert after['diffusion_t5x_requests_total{endpoint="completions",status="499"}'] == before + 4
    assert after["diffusion_t5x_completion_tokens_total"] < 4 * 400
    client = live_server.client(url)
    assert client.completions.create(model="stories", prompt=PROMPT, max_tokens=2).choices[0].text


def test_a_text_that_has_stopped_leaves_its_slot(url, stories):
    client = live_server.client(url)
    first = next(word for word in stories.generate(PROMPT, length=24).split(" ") if len(word) > 2)
    before = numbers(url)["diffusion_t5x_completion_tokens_total"]
    done = client.completions.create(model="stories", prompt=PROMPT, max_tokens=400, stop=first)
    assert done.usage.completion_tokens < 30
    assert numbers(url)["diffusion_t5x_completion_tokens_total"] - before == done.usage.completion_tokens


def test_when_decoding_fails_every_request_ends_and_health_says_so(stories):
    def fail(*arguments):
        raise RuntimeError("The device is gone.")

    failed = []
    with live_server.live(live_server.loaded(stories), on_failure=lambda: failed.append(True), scorer=fail) as url:
        client = live_server.client(url)
        assert client.completions.create(model="stories", prompt=PROMPT).choices
        with pytest.raises(openai.InternalServerError, match="the server's log says why"):
            client.completions.create(model="stories", prompt=PROMPT, logprobs=1)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/health")
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="stories", prompt=PROMPT)
    assert failed


@pytest.mark.slow
def test_the_verb_serves_until_a_signal_and_answers_what_runs(stories_folder, stories):
    verb = Verb(stories_folder, "--slots", "2", "--context", "500", DIFFUSION_T5X_API_KEY="secret")
    try:
        with pytest.raises(openai.AuthenticationError):
            live_server.client(verb.url).models.list()
        client = live_server.client(verb.url, key="secret")
        assert client.models.list().data[0].id == "stories"
        texts = []

        def ask():
            done = client.completions.create(model="stories", prompt=PROMPT, max_tokens=400)
            texts.append(done.choices[0].text)

        asking = [threading.Thread(target=ask) for _ in range(3)]  # one of them waits
        for thread in asking:
            thread.start()
        wait_for(lambda: numbers(verb.url)["diffusion_t5x_texts_waiting"] == 1)
        verb.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        for thread in asking:
            thread.join()
        assert texts == [stories.generate(PROMPT, length=400)] * 3
        assert verb.end() == 0
    finally:
        verb.process.kill()
    assert "stories, step 0, imported: 268,224 parameters" in verb.said[0] and "compiling" in verb.said[1]
    assert "secret" not in "".join(verb.said) and "Traceback" not in "".join(verb.said)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_verb_while_it_compiles(stories_folder, number):
    verb = Verb(stories_folder, until="compiling")
    verb.process.send_signal(number)
    assert verb.end() == -number and "Traceback" not in "".join(verb.said)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slots", "0"], "--slots must be at least 1, not 0"),
        (["--queue", "-1"], "--queue must not be negative"),
        (["--context", "10000"], "ModelConfig.max_length is 512"),
        (["--context", "8", "--length", "9"], "--length 9 does not fit --context 8"),
        (["--port", "70000"], "--port must be at least 0 and at most 65535; got 70000"),
        (["--port", str(TAKEN.getsockname()[1])], "Choose another --port"),
        (["--host", "no such name"], "Cannot listen at --host no such name"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(stories_folder, flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        serve.main(["--checkpoint", str(stories_folder), "--port", "0", *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_context_may_be_shorter_than_the_rows_of_prompts(stories):
    with live_server.live(live_server.loaded(stories), dataclasses.replace(live_server.LIMITS, context=12)) as url:
        done = live_server.client(url).completions.create(model="stories", prompt=PROMPT, max_tokens=8)
        assert done.choices[0].text == stories.generate(PROMPT, length=8)
        assert done.usage.prompt_tokens == 4


def test_a_second_server_fails_at_once():
    first = Server("127.0.0.1", 0, grace=1)
    port = int(first.url.rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port {port}: Address already in use. Choose another --port"):
        Server("127.0.0.1", port, grace=1)
    first._socket.close()


def test_while_the_model_is_loaded_the_status_is_503():
    server, found = Server("127.0.0.1", 0, grace=1), []
    with server.loading():
        for path, told in {"/health": "loading", "/v1/models": "The model is being loaded"}.items():
            with pytest.raises(urllib.error.HTTPError, match="503") as refused:
                urllib.request.urlopen(server.url + path, timeout=60)
            assert told in refused.value.read().decode() and refused.value.headers["Retry-After"]

    def ask():
        found.append(urllib.request.urlopen(server.url, timeout=60).read())
        server.fail()

    asking = threading.Thread(target=ask)
    asking.start()  # before the application listens
    with pytest.raises(SystemExit) as ended:
        server.run(Starlette(routes=[Route("/", lambda _: Response("Hello."))]), print)
    asking.join()
    assert found == [b"Hello."] and ended.value.code == 1


def test_the_commands_of_the_page_resolve(stories_folder, capsys):
    commands = re.findall(r"diffusion_t5x\.serve ([^\n]+)", by_module(PAGE.read_text(encoding="utf-8")))
    assert len(commands) == 2
    for command in commands:
        flags = shlex.split(command.replace("SundaeDecoder.num_steps", "AutoregressiveDecoder.top_k"))
        flags[flags.index("--checkpoint") + 1] = str(stories_folder)
        serve.main([*flags, "--print_config"])
        assert "Parameters for serve.serve" in capsys.readouterr().out
