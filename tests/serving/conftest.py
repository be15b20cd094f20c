"""The model of the llama2.c project that writes stories, 260,000 parameters, and a server of it."""

import live_server
import pytest

import diffusion_t5x as dt
from diffusion_t5x.convert import convert


@pytest.fixture(scope="session")
def stories_folder(test_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "stories"
    files = [test_data / "stories260k" / name for name in ("stories260K.bin", "tok512.bin")]
    convert(["from_llama2c", str(files[0]), "--tokenizer", str(files[1]), "--output", str(folder)])
    return folder


@pytest.fixture(scope="session")
def stories(stories_folder):
    return dt.load(stories_folder)


@pytest.fixture(scope="session")
def url(stories):
    with live_server.live(live_server.loaded(stories)) as url:
        yield url


@pytest.fixture
def client(url):
    return live_server.client(url)
