"""Servers that run in a thread of the tests, and their clients."""

import contextlib
import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import openai
import uvicorn

import diffusion_t5x as dt
from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.serving.assembly import Loaded, application
from diffusion_t5x.serving.service import Limits

LIMITS = Limits(context=96, most_inputs=None, slots=4, queue=8, body=20_000)


def loaded(model: dt.Model, decoder: Decoder | None = None, length: int = 24) -> Loaded:
    """A model that `load` has opened, for a server."""
    chat = Chat.of(model.tokenizer)
    prompts = Prompts(model.tokenizer, False, None, length, model.config.architecture, chat)
    name = pathlib.Path(model.name).name
    return Loaded(name, model.mesh, model.definition, model.params, prompts, decoder or model.decoder)


@dataclasses.dataclass(frozen=True)
class _Scored(Loaded):
    """A model with another scorer."""

    stand_in: Callable | None = None

    def scorer(self):
        return self.stand_in


@contextlib.contextmanager
def live(
    given: Loaded,
    limits: Limits = LIMITS,
    api_key: str | None = None,
    on_failure: Callable[[], None] = lambda: None,
    scorer: Callable | None = None,
) -> Iterator[str]:
    """Serves a model; gives the URL of the server. A `scorer` stands in for the model's own."""
    if scorer is not None:
        given = _Scored(**vars(given), stand_in=scorer)
    app = application(given, limits, api_key, on_failure)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def client(url: str, key: str = "none", **settings) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, **settings)


def wait_for(condition, seconds: float = 20) -> None:
    """Waits until a condition holds; fails if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition has not come true"
        time.sleep(0.02)


def numbers(url):
    """The numbers of a server's /metrics, by name."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:{.*?})?) (\S+)$", text, re.MULTILINE)}


class Verb:
    """`diffusion-t5x serve` in a process of its own."""

    def __init__(self, folder, *flags, **environment):
        command = [sys.executable, "-m", "diffusion_t5x", "serve", "--checkpoint", str(folder), "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}, cwd=folder
        )
        self.said = []
        while not self.said or "Serving at" not in self.said[-1]:
            line = self.process.stderr.readline()
            assert line, self.said
            self.said.append(line)
        self.url = self.said[-1].split()[-1]

    def end(self):
        """Waits for the end; gives the status."""
        self.said += self.process.communicate(timeout=60)[1].splitlines()
        return self.process.returncode
