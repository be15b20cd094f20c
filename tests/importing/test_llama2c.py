"""Imported llama2.c checkpoints, against a numpy forward pass on the file itself and the text its author published."""

import json
import pathlib
import re
import shlex

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from pages import by_module

from diffusion_t5x import infer, partitioning
from diffusion_t5x.checkpointing import checkpoints, restoring
from diffusion_t5x.command_line import config
from diffusion_t5x.convert import convert, from_llama2c
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.importing import llama2c
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.masks import CAUSAL, Slots

pytest.importorskip("seqio")
from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "convert.md"
MESH = partitioning.MeshConfig().make()


def plain_forward(path, tokens):
    """Logits `[L, V]` in float64, read and computed as run.c does: position by position, pairs (2i, 2i + 1) turned."""
    dim, hidden, layers, heads, kv_heads, vocab, length = np.fromfile(path, "<i4", 7).tolist()
    size, rows = dim // heads, abs(vocab)
    values = np.fromfile(path, "<f4", offset=28).astype(np.float64)

    def take(*shape):
        nonlocal values
        array, values = values[: np.prod(shape)].reshape(shape), values[np.prod(shape) :]
        return array

    embedding, attention_norm, wq = take(rows, dim), take(layers, dim), take(layers, dim, dim)
    wk, wv = take(layers, kv_heads * size, dim), take(layers, kv_heads * size, dim)
    wo, mlp_norm, w1 = take(layers, dim, dim), take(layers, dim), take(layers, hidden, dim)
    w2, w3, final_norm = take(layers, dim, hidden), take(layers, hidden, dim), take(dim)
    take(2, length, size // 2)
    readout = embedding if vocab > 0 else take(rows, dim)
    assert not len(values)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def turn(x):
        turned = np.empty_like(x)
        for position, i in np.ndindex(len(x), size // 2):
            angle = position * 10_000.0 ** (-2 * i / size)
            a, b = x[position, :, 2 * i], x[position, :, 2 * i + 1]
            turned[position, :, 2 * i] = a * np.cos(angle) - b * np.sin(angle)
            turned[position, :, 2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    x = embedding[tokens]
    for layer in range(layers):
        y = norm(x, attention_norm[layer])
        query = turn((y @ wq[layer].T).reshape(-1, heads, size))
        key, value = ((y @ w[layer].T).reshape(-1, kv_heads, size) for w in (wk, wv))
        key, mixed = turn(key), np.zeros_like(query)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = np.exp(query[:, head] @ key[:, shared].T / np.sqrt(size)) * np.tri(len(tokens))
            mixed[:, head] = scores / scores.sum(-1, keepdims=True) @ value[:, shared]
        x = x + mixed.reshape(-1, dim) @ wo[layer].T
        y = norm(x, mlp_norm[layer])
        gate = y @ w1[layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w3[layer].T)) @ w2[layer].T
    return norm(x, final_norm) @ readout.T


def logits(definition, params, tokens):
    """float32 `[L, V]` of what an autoregressive model reads."""
    positions = jnp.arange(len(tokens))[None]
    slots = Slots(segment_ids=jnp.ones_like(positions), positions=positions, is_input=jnp.zeros_like(positions) > 0)
    model = definition.bind(params)
    return np.asarray(model.logits(model(jnp.asarray(tokens)[None], slots, CAUSAL).hidden)[0])


def load(folder):
    """The imported model as eval and infer load it, and its vocabulary."""
    vocabulary = Llama2cVocabulary(str(folder / "tokenizer.bin"))
    config.load([str(folder / "model.gin")])
    model = ModelConfig(**gin.get_bindings(ModelConfig))
    return *load_model(str(folder), model, token_ids(vocabulary), MESH), vocabulary


def write_model(path, seed=0, **changes):
    """A random checkpoint with an output matrix of its own and three query heads to a key head."""
    header = {
        "dim": 24,
        "hidden_dim": 20,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "vocab_size": -512,
        "length": 16,
    }
    header |= changes
    dim, hidden, layers, heads, kv_heads, rows, length = header.values()
    kv_dim, rows = dim // heads * kv_heads, abs(rows)
    rng = np.random.default_rng(seed)
    parts = [
        rng.standard_normal(rows * dim),
        1 + 0.2 * rng.standard_normal(layers * dim),
        0.3 * rng.standard_normal(layers * dim * (2 * dim + 2 * kv_dim)),
        1 + 0.2 * rng.standard_normal(layers * dim),
        0.3 * rng.standard_normal(layers * dim * 3 * hidden),
        1 + 0.2 * rng.standard_normal(dim),
        np.zeros(length * dim // heads),
        rng.standard_normal(rows * dim),
    ]
    path.write_bytes(np.array([*header.values()], "<i4").tobytes() + np.concatenate(parts).astype("<f4").tobytes())
    return path


@pytest.fixture(scope="module")
def data(test_data):
    return test_data / "stories260k"


@pytest.fixture(scope="module")
def stories(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "stories"
    command = [data / "stories260K.bin", "--tokenizer", data / "tok512.bin", "--output", folder]
    convert(["from_llama2c", *map(str, command)])
    return folder


@pytest.fixture(scope="module")
def expected(data):
    return (data / "expected_greedy.txt").read_text(encoding="utf-8").removesuffix("\n")


def test_greedy_decoding_from_bos_writes_the_published_text(stories, expected):
    definition, params, vocabulary = load(stories)
    step = make_decode_step(MESH, definition, AutoregressiveDecoder(), seed=0)
    decoded = step(params, tiny.one_a_row([([], [0] * 256)]))
    tokens = decoded.tokens[0].tolist()
    assert decoded.steps == 256 and vocabulary.decode(tokens) == expected
    assert tokens == vocabulary.encode(expected)


def test_logits_are_those_of_the_file(stories, data, expected):
    definition, params, vocabulary = load(stories)
    tokens = [1, *vocabulary.encode(expected)[:63]]
    plain = plain_forward(data / "stories260K.bin", tokens)
    found = logits(definition, params, tokens)
    np.testing.assert_allclose(found[:, :512], plain, rtol=0, atol=1e-4)
    # MASK and what fills up read as the mean of all pieces.
    np.testing.assert_allclose(found[:, 512:], np.tile(plain.mean(1, keepdims=True), 128), rtol=0, atol=1e-4)


def test_an_output_matrix_and_grouped_heads(tmp_path, data, capsys):
    source = write_model(tmp_path / "random.bin")
    from_llama2c(str(source), str(data / "tok512.bin"), str(tmp_path / "out"))
    assert re.search(r"wcls +\[512, 24\] +head +\[24, 640\]", capsys.readouterr().out)
    definition, params, _ = load(tmp_path / "out")
    assert definition.config.kv_heads == 2 and not definition.config.tie_embeddings
    tokens = np.random.default_rng(1).integers(0, 512, 16)
    plain = plain_forward(source, tokens)
    assert plain.std() > 1
    np.testing.assert_allclose(logits(definition, params, tokens)[:, :512], plain, rtol=0, atol=1e-4)


def test_new_rows_start_at_the_mean_and_nothing_else_changes(stories, data):
    _, params, vocabulary = load(stories)
    table = np.fromfile(data / "stories260K.bin", "<f4", 512 * 64, offset=28).reshape(512, 64)
    np.testing.assert_array_equal(params["embedding"][:512], table)
    np.testing.assert_allclose(params["embedding"][512:], np.tile(table.mean(0), (128, 1)), atol=1e-7)
    metadata = checkpoints.read_metadata(str(stories))
    assert metadata["step"] == 0 and metadata["config"] == (stories / "model.gin").read_text(encoding="utf-8")
    assert metadata["vocabulary"] == token_ids(vocabulary).describe() and metadata["vocabulary"]["mask_id"] == 512


def test_a_run_starts_from_it_with_a_fresh_optimizer(stories):
    _, params, _ = load(stories)
    state = {"step": jnp.int32(5), "params": jax.tree.map(jnp.zeros_like, params), "opt_state": [jnp.ones(3)]}
    sharding = partitioning.replicated(MESH)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    restored = restoring.restore_initial(str(stories), abstract, [("step|opt_state/.*", None)], lambda: state)
    assert restored["step"] == 5
    jax.tree.map(np.testing.assert_array_equal, restored["params"], params)


@pytest.mark.slow
def test_the_commands_of_the_page(data, expected, tmp_path, monkeypatch, capsys):
    """Run as they stand, with the files where the page says and /tmp elsewhere."""
    for name in ("stories260K.bin", "tok512.bin"):
        (tmp_path / name).symlink_to(data / name)
    monkeypatch.chdir(tmp_path)
    *_, block = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    prompts, converting, inferring = by_module(block).replace("/tmp/", f"{tmp_path}/").splitlines()
    text, file = re.fullmatch(r"printf '(.+)' > (.+)", prompts).groups()
    pathlib.Path(file).write_text(text.replace("\\n", "\n"))
    convert(shlex.split(converting)[3:])
    config.run(infer.infer, shlex.split(inferring)[3:])
    (written,) = tmp_path.glob("*/stories_prompts-test.jsonl")
    records = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [record["inputs_pretokenized"] for record in records] == ["", "Once upon a time"]
    assert records[0]["prediction"] == expected
    assert records[1]["prediction"].startswith(expected.removeprefix("Once upon a time"))
    assert "Wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (lambda whole: whole[:20], "20 bytes are too few"),
        (lambda whole: whole[:-4], "truncated"),
        (lambda whole: whole + b"more", "too long"),
        (lambda whole: b"{json: true}" * 100, "not a llama2.c checkpoint: its header would be dim 1869834875"),
        (lambda whole: np.array([0x616B3432, 2, *range(50)], "<i4").tobytes(), "export it with `--version 0`"),
    ],
)
def test_files_that_are_no_checkpoint(contents, message, tmp_path):
    path = write_model(tmp_path / "model.bin")
    path.write_bytes(contents(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        llama2c.read(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "none may be 0"),
        ({"n_heads": 5, "n_kv_heads": 5}, "dim must be a multiple of n_heads"),
        ({"n_kv_heads": 4}, "n_heads must be a multiple of n_kv_heads"),
        ({"n_heads": 8, "n_kv_heads": 8}, "must be even"),
    ],
)
def test_headers_that_do_not_multiply(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        llama2c.read(str(write_model(tmp_path / "model.bin", **changes)))


def test_mistakes_on_the_command_line(data, tmp_path):
    tokenizer = data / "tok512.bin"
    model = write_model(tmp_path / "model.bin", vocab_size=-500)
    (tmp_path / "full" / "checkpoints").mkdir(parents=True)

    def run(source, tokenizer, output="new"):
        convert(["from_llama2c", str(source), "--tokenizer", str(tokenizer), "--output", str(tmp_path / output)])

    with pytest.raises(UserError, match=r"has 512 pieces, but .* is a model of 500"):
        run(model, tokenizer)
    with pytest.raises(UserError, match="full is not empty"):
        run(model, tokenizer, "full")
    with pytest.raises(UserError, match=r"Cannot read the checkpoint .*nowhere\.bin"):
        run(tmp_path / "nowhere.bin", tokenizer)
    with pytest.raises(UserError, match="Cannot write to"):
        run(data / "stories260K.bin", tokenizer, "model.bin/below")
    with pytest.raises(UserError, match=r"invalid choice: 'from_llama'.*from_llama2c"):
        convert(["from_llama"])
    with pytest.raises(UserError, match="required: --output"):
        convert(["from_llama2c", str(model), "--tokenizer", str(tokenizer)])
    assert not (tmp_path / "new").exists()
