"""64 clients at once: each text is its own, nothing is lost, memory stays flat; `-s` prints the figures."""

import concurrent.futures
import dataclasses
import http.client
import json
import random
import statistics
import time
import urllib.parse

import jax
import numpy as np
import pytest
from live_server import Verb, numbers, wait_for

from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.evaluation.inference import make_decode_step

CLIENTS, SLOTS, CONTEXT = 64, 8, 192
PROMPTS = ["Once upon a time", "Lily and Tom", "The dog", "It was a sunny day", "One day, a bird", "Mom said"]
LENGTHS = [8, 8, 16, 16, 24, 32, 48, 120]  # most texts are short, few are long
DECODER = AutoregressiveDecoder(temperature=1.0)
SECONDS_OF_STATIC = 10


@dataclasses.dataclass(frozen=True)
class Request:
    prompt: str
    length: int
    seed: int


REQUESTS = [Request(prompt, length, seed) for prompt in PROMPTS for length in sorted(set(LENGTHS)) for seed in range(2)]


def alone(model):
    """The text of each request, written by itself."""
    texts = {}
    for seed in {request.seed for request in REQUESTS}:
        step = make_decode_step(model.mesh, model.definition, DECODER, seed=seed)
        for request in (request for request in REQUESTS if request.seed == seed):
            row = Prompts(model.tokenizer, False, None, request.length, "decoder_only").row(
                list(model.tokenizer.encode(request.prompt)), 0
            )
            row = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, CONTEXT - x.shape[1]))) if x.ndim == 2 else x, row)
            with jax.set_mesh(model.mesh):
                decoded = jax.device_get(step(model.params, row))
            texts[request] = model.tokenizer.decode(
                decoded.tokens[0, row.target_mask[0]][: int(decoded.num_tokens[0])].tolist()
            )
    return texts


def ask_until(url, end, number):
    """Asks one request after another; gives the request, the answer, the tokens and the seconds of each."""
    rng, place = random.Random(number), urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=120)
    found = []
    while time.monotonic() < end:
        request = Request(rng.choice(PROMPTS), rng.choice(LENGTHS), rng.randrange(2))
        body = {"prompt": request.prompt, "max_tokens": request.length, "seed": request.seed, "temperature": 1}
        start = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        assert answer.status == 200, content
        tokens = content["usage"]["completion_tokens"]
        found.append((request, content["choices"][0]["text"], tokens, time.monotonic() - start))
    return found


def static_tokens_per_second(model):
    """The same kind of requests in whole batches, each as long as its longest text."""
    rng, rows = random.Random(0), Prompts(model.tokenizer, False, None, 1, "decoder_only")
    step = make_decode_step(model.mesh, model.definition, DECODER, seed=0)
    tokens, start, end = 0, None, None
    while end is None or time.monotonic() < end:
        batches = []
        for _ in range(SLOTS):
            prompts = dataclasses.replace(rows, length=rng.choice(LENGTHS))
            row = prompts.row(list(model.tokenizer.encode(rng.choice(PROMPTS))), 0)
            batches.append(
                jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, CONTEXT - x.shape[1]))) if x.ndim == 2 else x, row)
            )
        with jax.set_mesh(model.mesh):
            decoded = jax.device_get(step(model.params, jax.tree.map(lambda *x: np.concatenate(x), *batches)))
        if start is None:  # the first one compiles
            start = time.monotonic()
            end = start + SECONDS_OF_STATIC
        else:
            tokens += int(decoded.num_tokens.sum())
    return tokens / (time.monotonic() - start)


@pytest.mark.slow
def test_under_load_every_text_is_its_own(stories_folder, stories, request):
    minutes = request.config.getoption("--load_minutes")
    expected = alone(stories)
    flags = "--slots", str(SLOTS), "--queue", str(CLIENTS), "--context", str(CONTEXT)
    static = static_tokens_per_second(stories)
    verb = Verb(stories_folder, *flags, "--gin.AutoregressiveDecoder.temperature=1.0")
    try:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda n: ask_until(verb.url, time.monotonic() + 3, n), range(CLIENTS)))  # warm
            before, start = numbers(verb.url)["process_resident_memory_bytes"], time.monotonic()
            end = start + 60 * minutes
            asked = pool.map(lambda n: ask_until(verb.url, end, 1000 + n), range(CLIENTS))
            found = [each for client in asked for each in client]
            seconds = time.monotonic() - start
        wait_for(lambda: numbers(verb.url)["diffusion_t5x_texts_running"] == 0)
        after = numbers(verb.url)["process_resident_memory_bytes"]
    finally:
        verb.process.terminate()
    assert verb.end() == 0
    assert len(found) > CLIENTS and {given for given, *_ in found} <= expected.keys()
    assert [text for given, text, *_ in found] == [expected[given] for given, *_ in found]
    assert after < 1.1 * before
    times = statistics.quantiles([took for *_, took in found], n=20)
    tokens = sum(written for *_, written, _ in found)
    print(
        f"\n{len(found)} requests in {seconds:.0f} s: p50 {times[9]:.2f} s, p95 {times[18]:.2f} s; "
        f"{tokens / seconds:.0f} tokens/s, static batches {static:.0f}; "
        f"memory {before / 2**20:.0f} MiB, then {after / 2**20:.0f} MiB"
    )
