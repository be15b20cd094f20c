"""Inputs that nobody meant: they end in a result or in one `UserError`, and in nothing else. More than 10,000 of them.

`HYPOTHESIS_CASES` multiplies their number. What is drawn is the same each time.
"""

import json
import os
import pathlib
import string
import struct

import gin
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from diffusion_t5x.checkpointing import checkpoints, manifest, stored
from diffusion_t5x.command_line import config
from diffusion_t5x.data import templates
from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import predictions
from diffusion_t5x.importing import families, huggingface
from diffusion_t5x.tasks import local_files, readers

pytestmark = pytest.mark.slow

FACTOR = int(os.environ.get("HYPOTHESIS_CASES", "1"))


def cases(number):
    checks = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
    return hypothesis.settings(
        max_examples=number * FACTOR, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )


def told(work):
    """The result; None where the user is told in one message what is wrong."""
    try:
        return work()
    except UserError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        return None


# gin: lines that are nearly right, so that they come past the first check.
NAMES = ["train", "train.train", "loop.Periods", "MODEL", "optimizers.adamw", "models.config", "gin", "a/b", "x"]
WORDS = [*NAMES, *"=()[]{},:@%./'\"#\\*-_01", "None", "True", "%gin.REQUIRED", "include", "import", "from", "as"]
VALUES = [
    "1",
    "None",
    "'a'",
    "@train.train",
    "@train.train()",
    "%X",
    "%X.y",
    "(1,",
    "{'a': @x}",
    "-",
    "1e999",
    "\ud7ff",
]
IMPORTS = [
    *("from __gin__ import dynamic_registration", "from __gin__ import x", "import diffusion_t5x.train as train"),
    *("from diffusion_t5x import train", "from diffusion_t5x.training import loop", "import os", "import gin"),
    *("include 'hardware/cpu.gin'", "include 'none.gin'", "include 5", "from . import x"),
]


@st.composite
def gin_lines(draw):
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.sampled_from(IMPORTS))
    if kind == 1:
        name = draw(st.sampled_from(NAMES)) + draw(st.sampled_from(["", ".train_steps", ".log", ".zzz", ".a.b"]))
        return f"{name} = {draw(st.sampled_from(VALUES))}"
    if kind == 2:
        return draw(st.sampled_from(["", " "])).join(draw(st.lists(st.sampled_from(WORDS), max_size=8)))
    return draw(st.text(max_size=20))


GIN = st.lists(gin_lines(), max_size=6).map("\n".join)


@pytest.fixture(autouse=True)
def no_gin_is_left():
    yield
    gin.clear_config()


@cases(3000)
@hypothesis.given(GIN)
def test_gin_files(tmp_path, text):
    (tmp_path / "x.gin").write_text(text, encoding="utf-8", errors="surrogatepass")
    told(lambda: config.load([str(tmp_path / "x.gin")]))
    told(config.operative_text)


@cases(1500)
@hypothesis.given(st.one_of(GIN, st.sampled_from(VALUES)), st.sampled_from(NAMES))
def test_gin_flags(text, name):
    told(lambda: config.load([], [f"{name} = {text}"]))
    told(lambda: config.load([], [text]))


# JSON lines: JSON of all kinds, cut and garbled.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PARTS = [*"ab <>\\:0 9é\ud800\x00", "<hole:3>", "\\<hole:2>", "<hole:", "<hole:-1>"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)


def lines_with(*fields):
    whole = st.dictionaries(st.sampled_from(fields), TEXTS | JSON, min_size=1).map(json.dumps).map(str.encode)
    other = JSON.map(json.dumps).map(str.encode)
    cut = st.builds(lambda line, at: line[: at % (len(line) + 1)], whole, st.integers(0, 100))
    nested = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe", b"\xef\xbb\xbf{}", b"\r"])
    line = st.one_of(whole, whole, cut, other, st.binary(max_size=12), nested)
    return st.lists(line, max_size=4).map(b"\n".join)


@cases(1500)
@hypothesis.given(lines_with("inputs", "targets", "text", "predictions"))
def test_records_of_files(tmp_path, content):
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    for reader in (readers.Jsonl(), readers.Tsv(), readers.Text()):
        told(lambda: list(reader.read([str(file)])))  # noqa: B023
    template = {"inputs": "{inputs}", "targets": "{targets}"}
    told(
        lambda: list(
            local_files.source({"train": str(file)}, readers.Jsonl(), template).in_seqio().get_dataset("train")
        )
    )


@cases(1500)
@hypothesis.given(lines_with("prediction", "predictions", "example_id"))
def test_predictions_made_elsewhere(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    lines = told(lambda: predictions.read_predictions(str(tmp_path / "x.jsonl")))
    if lines is not None:
        told(lambda: predictions.add_predictions([{"targets": "a"}] * 2, lines, "x.jsonl", "a task"))


@cases(1500)
@hypothesis.given(lines_with("template", "inputs", "templat"))
def test_templates_with_holes(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    found = told(lambda: templates.Templates.read(str(tmp_path / "x.jsonl"), None))
    if found is not None:
        for template in found._templates:
            assert len(template.parts) == len(template.holes) + 1
            assert all(hole.size > 0 if hole.is_known else hole.size != 0 for hole in template.holes)


# Models of others.
@cases(1000)
@hypothesis.given(st.binary(max_size=64), st.integers(0, 64), st.integers(1, 3))
def test_tokenizers_of_llama2c(tmp_path, garbage, at, number):
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{byte:02X}>".encode() for byte in range(256)), b"a"]
    body = b"".join(struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces)
    whole = struct.pack("<i", 5) + body
    broken = {1: whole[:at] + garbage + whole[at + len(garbage) :], 2: whole[: 8 * at], 3: garbage}[number]
    (tmp_path / "tok.bin").write_bytes(broken)

    def use():
        vocabulary = Llama2cVocabulary(str(tmp_path / "tok.bin"))
        return vocabulary.decode(vocabulary.encode("ab"))

    told(use)


CONFIG = {
    **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 16, "hidden_size": 8},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8},
    **{"head_dim": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True, "hidden_act": "silu"},
}


@cases(1000)
@hypothesis.given(
    st.dictionaries(st.sampled_from([*CONFIG, "rope_scaling", "zzz"]), JSON, min_size=1, max_size=2),
    st.binary(max_size=20),
    st.booleans(),
)
def test_models_in_hugging_faces_format(tmp_path, changes, garbage, garbled):
    import safetensors.numpy

    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    weights = safetensors.numpy.save({"model.embed_tokens.weight": np.zeros((16, 8), np.float32)})
    (tmp_path / "model.safetensors").write_bytes(garbage + weights[len(garbage) :] if garbled else weights)
    told(lambda: families.describe(huggingface.Folder.open(str(tmp_path))))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saver = checkpoints.Checkpoints(str(folder), asynchronous=False)
    saver.save(3, {"step": np.int32(3), "params": {"w": np.arange(6.0)}}, {"position": np.arange(4)}, {"step": 3})
    saver.close()
    return checkpoints.find_checkpoint(str(folder))


@cases(500)
@hypothesis.given(st.data())
def test_checkpoints_whose_files_are_garbled(checkpoint, data):
    files = [pathlib.Path(checkpoint, name) for name in manifest.files(checkpoint)]
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    at, garbage = data.draw(st.integers(0, max(0, len(whole) - 1))), data.draw(st.binary(min_size=1, max_size=8))
    file.write_bytes(
        data.draw(st.sampled_from([whole[:at], whole[:at] + garbage + whole[at + len(garbage) :], garbage]))
    )
    changed = file.read_bytes() != whole
    try:
        arrays = told(lambda: stored.read_tree(checkpoint, "data") if not stored.check(checkpoint) else None)
        noted = file.name in (manifest.NOTES, "commit_success.txt") or file.name == manifest.FILE
        assert arrays is None or noted or not changed
        if arrays is not None:
            np.testing.assert_array_equal(arrays["position"], np.arange(4))
    finally:
        file.write_bytes(whole)


def test_there_are_ten_thousand():
    with open(__file__, encoding="utf-8") as file:
        numbers = [line.partition("(")[2].rstrip(")\n") for line in file if line.startswith("@cases(")]
    assert sum(map(int, numbers)) >= 10_000 and all(set(number) <= set(string.digits) for number in numbers)
