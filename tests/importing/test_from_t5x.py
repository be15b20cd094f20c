"""Imports from T5X: the arrays against their files read by hand, logits against `transformers`, what is refused."""

import gzip
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import tarfile

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import open_models
import pytest
import tensorstore
from flax import serialization, traverse_util
from in_torch import as_batch, load_ours, run_theirs
from pages import by_module

from diffusion_t5x.checkpointing import restoring
from diffusion_t5x.convert import convert
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import CAUSAL, Slots

pytest.importorskip("seqio")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "convert.md"
EMBED, HEADS, HEAD_DIM, MLP, BUCKETS, LAYERS, PIECES = 8, 2, 4, 12, 6, 2, 330


def import_model(folder, tokenizer, output, *flags):
    convert(["from_t5x", str(folder), "--tokenizer", str(tokenizer), "--output", str(output), *flags])


def params_of(folder):
    shapes, read = restoring.open_params(str(folder / "checkpoints" / "checkpoint_0"))
    return {name: read(name) for name in shapes}


def read_by_hand(folder):
    """All arrays of a checkpoint by name, without flax or tensorstore."""

    def extension(_, data):
        shape, dtype, values = msgpack.unpackb(data)
        return np.frombuffer(values, np.dtype(dtype)).reshape(shape)

    def read(leaf):
        if not isinstance(leaf, dict):
            return np.asarray(leaf)
        path = folder / leaf["kvstore"]["path"]
        header = json.loads((path / ".zarray").read_text())
        array = np.zeros(header["shape"], header["dtype"])
        for file in path.glob("[0-9]*"):
            chunk = np.frombuffer(gzip.decompress(file.read_bytes()), header["dtype"]).reshape(header["chunks"])
            where = [int(n) * size for n, size in zip(file.name.split("."), chunk.shape, strict=True)]
            place = array[tuple(slice(start, start + size) for start, size in zip(where, chunk.shape, strict=True))]
            place[:] = chunk[tuple(map(slice, place.shape))]
        return array

    tree = msgpack.unpackb((folder / "checkpoint").read_bytes(), ext_hook=extension)
    leaves = traverse_util.flatten_dict(tree, sep="/", is_leaf=lambda _, branch: "driver" in branch)
    return {name: read(leaf) for name, leaf in leaves.items()}


@pytest.fixture(scope="module")
def published(test_data, tmp_path_factory):
    """The folder of a checkpoint that T5X has written, and its import."""
    folder = tmp_path_factory.mktemp("t5x")
    with tarfile.open(test_data / "t5_1_1_tiny" / "test_t5_1_1_tiny.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    source, here = folder / "test_t5_1_1_tiny" / "checkpoint_3", folder / "here"
    tokenizer = test_data / "t5_sentencepiece" / "t5_vocab.model"
    import_model(source, tokenizer, here, "--max_distance", "8")  # that of the tests it was made for
    return source, here


OURS = {
    r"token_embedder/embedding": "embedding",
    r"decoder/logits_dense/kernel": "head",
    r"(\w+)/layers_\d/(?:self_)?attention/(\w+)/kernel": r"\1/blocks/attention/\2",
    r"(\w+)/layers_\d/encoder_decoder_attention/(\w+)/kernel": r"\1/blocks/cross_attention/\2",
    r"(\w+)/layers_\d/pre_(?:self_)?attention_layer_norm/scale": r"\1/blocks/attention_norm/scale",
    r"(\w+)/layers_\d/pre_cross_attention_layer_norm/scale": r"\1/blocks/cross_attention_norm/scale",
    r"(\w+)/layers_\d/pre_mlp_layer_norm/scale": r"\1/blocks/mlp_norm/scale",
    r"(\w+)/layers_\d/mlp/(\w+)/kernel": r"\1/blocks/mlp/\2",
    r"(\w+)/(?:en|de)coder_norm/scale": r"\1/final_norm/scale",
    r"(\w+)/relpos_bias/rel_embedding": r"\1/relative_bias/embedding",
}


def ours(name):
    return next(re.sub(there, here, name) for there, here in OURS.items() if re.fullmatch(there, name))


def test_every_array_of_a_published_checkpoint_is_accounted_for(published, test_data, tmp_path, capsys):
    source, _ = published
    import_model(source, test_data / "t5_sentencepiece" / "t5_vocab.model", tmp_path / "out")
    printed = capsys.readouterr().out
    arrays = read_by_hand(source)
    targets = {name.removeprefix("optimizer/target/") for name in arrays if name.startswith("optimizer/target/")}
    assert len(targets) == 52 and len(arrays) == 52 + 4 * 52 + 2  # with the step, and the format's version
    rows = [line.split("  ")[0] for line in printed.splitlines()]
    named = [row.replace("layers_0-1", f"layers_{layer}") for row in rows for layer in range(2)]
    dropped = {name for name in arrays if not name.startswith("optimizer/target/")}
    assert dropped | targets <= set(named)
    assert printed.count("dropped") == sum("optimizer/state" in row or row == "version" for row in rows)
    # Each array is there, and in its place.
    params = params_of(tmp_path / "out")
    counts = dict.fromkeys(params, 0)
    for name in targets:
        array, layer = arrays[f"optimizer/target/{name}"], re.search(r"layers_(\d)", name)
        found = params[ours(name)]
        found = found[int(layer[1])] if layer else found
        expected = array.T if "rel_embedding" in name else array
        np.testing.assert_array_equal(found.reshape(expected.shape), expected, err_msg=name)
        counts[ours(name)] += array.size
    assert counts == {name: array.size for name, array in params.items()}


def their_names(arrays):
    """The arrays as `transformers` calls and lays them, by T5's paper and the names' sense."""
    head = arrays["decoder/logits_dense/kernel"].T
    tensors = {"shared.weight": arrays["token_embedder/embedding"], "lm_head.weight": head}
    attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
    sublayers = {
        "encoder": [("attention", "SelfAttention", "pre_attention_layer_norm")],
        "decoder": [
            ("self_attention", "SelfAttention", "pre_self_attention_layer_norm"),
            ("encoder_decoder_attention", "EncDecAttention", "pre_cross_attention_layer_norm"),
        ],
    }
    for stack, kinds in sublayers.items():
        bias = arrays[f"{stack}/relpos_bias/rel_embedding"]
        tensors[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias.T
        tensors[f"{stack}.final_layer_norm.weight"] = arrays[f"{stack}/{stack}_norm/scale"]
        for block in range(2):
            here = f"{stack}/layers_{block}"
            for number, (ours, theirs, norm) in enumerate(kinds):
                layer = f"{stack}.block.{block}.layer.{number}"
                tensors[f"{layer}.layer_norm.weight"] = arrays[f"{here}/{norm}/scale"]
                for long, short in attention.items():
                    tensors[f"{layer}.{theirs}.{short}.weight"] = arrays[f"{here}/{ours}/{long}/kernel"].T
            layer = f"{stack}.block.{block}.layer.{len(kinds)}"
            tensors[f"{layer}.layer_norm.weight"] = arrays[f"{here}/pre_mlp_layer_norm/scale"]
            for name in ("wi_0", "wi_1", "wo"):
                tensors[f"{layer}.DenseReluDense.{name}.weight"] = arrays[f"{here}/mlp/{name}/kernel"].T
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: the extra `hf`")
def test_logits_of_a_published_checkpoint_are_those_of_transformers(published, tmp_path):
    source, here = published
    arrays = {name.removeprefix("optimizer/target/"): array for name, array in read_by_hand(source).items()}
    t5 = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": 32_128,
        "d_model": 4,
        "d_kv": 2,
        "d_ff": 8,
        "num_layers": 2,
        "num_heads": 2,
        "relative_attention_num_buckets": 4,
        "relative_attention_max_distance": 8,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(t5))
    open_models.save_shards(tmp_path, their_names(arrays))
    run_theirs("logits", tmp_path)
    said = np.load(tmp_path / "logits.npz")
    definition, params = load_ours(here, "t5_vocab.model")
    batch = jax.tree.map(jnp.asarray, as_batch(said, has_encoder=True))

    @jax.jit
    def logits(params):
        model = definition.bind(params)
        return model.logits(model(batch.tokens, Slots.of(batch), CAUSAL, model.encode(batch)).hidden)

    expected, there = said["logits"], said["there"]
    assert expected[there].std() > 0.2
    np.testing.assert_allclose(np.asarray(logits(params))[there], expected[there], rtol=0, atol=1e-4)


def target(layers=LAYERS, rows=PIECES + 100, head=True):
    """A small model's arrays by name."""
    joined, shapes = HEADS * HEAD_DIM, {"token_embedder/embedding": (rows, EMBED)}
    attention = {"query": (EMBED, joined), "key": (EMBED, joined), "value": (EMBED, joined), "out": (joined, EMBED)}
    mlp = {"wi_0": (EMBED, MLP), "wi_1": (EMBED, MLP), "wo": (MLP, EMBED)}
    for stack, kinds in (("encoder", ["attention"]), ("decoder", ["self_attention", "encoder_decoder_attention"])):
        shapes |= {f"{stack}/relpos_bias/rel_embedding": (HEADS, BUCKETS), f"{stack}/{stack}_norm/scale": (EMBED,)}
        for layer in range(layers):
            norms = [*(kind.replace("encoder_decoder", "cross") for kind in kinds), "mlp"]
            within = {f"pre_{norm}_layer_norm/scale": (EMBED,) for norm in norms}
            within |= {f"{kind}/{name}/kernel": shape for kind in kinds for name, shape in attention.items()}
            within |= {f"mlp/{name}/kernel": shape for name, shape in mlp.items()}
            shapes |= {f"{stack}/layers_{layer}/{name}": shape for name, shape in within.items()}
    if head:
        shapes["decoder/logits_dense/kernel"] = (EMBED, rows)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_zarr(folder, path, array):
    """An array beside the msgpack file, and what that says of it."""
    dtype = "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str
    metadata = {"shape": list(array.shape), "chunks": [3] * array.ndim, "dtype": dtype}
    metadata["compressor"] = {"id": "gzip", "level": 1}
    kvstore = {"driver": "file", "path": str(folder / path)}
    tensorstore.open({"driver": "zarr", "kvstore": kvstore, "metadata": metadata}, create=True).result()[...] = array
    return {"driver": "zarr", "kvstore": {"driver": "gfile", "path": path}, "metadata": metadata}


def write_checkpoint(folder, arrays, state=None):
    folder.mkdir(exist_ok=True)
    tree = {"optimizer": {"target": traverse_util.unflatten_dict(arrays, sep="/"), "state": state or {"step": 3}}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree | {"version": 3}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t5.model"
    open_models.save_sentencepiece(path, vocab_size=PIECES, hard_vocab_limit=True)
    return path


def test_arrays_inline_and_beside_in_any_precision_and_a_new_row_for_mask(tmp_path, tokenizer):
    arrays = target()
    source = tmp_path / "source"
    key, query = (f"decoder/layers_1/self_attention/{name}/kernel" for name in ("key", "query"))
    low = arrays[key].astype(ml_dtypes.bfloat16)
    head = write_zarr(source, "a/b/head", arrays["decoder/logits_dense/kernel"])
    old = write_zarr(source, "old", arrays[query].astype(np.float16))
    old["path"] = old.pop("kvstore")["path"]  # as tensorstore had it before 0.1.14
    write_checkpoint(
        source, arrays | {"decoder/logits_dense/kernel": head, key: write_zarr(source, "low", low), query: old}
    )
    import_model(source, tokenizer, tmp_path / "out", "--activation", "silu")
    params = params_of(tmp_path / "out")
    np.testing.assert_array_equal(params["decoder/blocks/attention/key"][1].reshape(low.shape), low.astype(np.float32))
    found = params["decoder/blocks/attention/query"][1].reshape(EMBED, -1)
    np.testing.assert_array_equal(found, arrays[query].astype(np.float16).astype(np.float32))
    expected = arrays["decoder/logits_dense/kernel"]
    rows = expected.shape[1]
    assert params["head"].shape == (EMBED, 512) and params["embedding"].shape == (512, EMBED)
    np.testing.assert_array_equal(params["head"][:, :rows], expected)
    np.testing.assert_allclose(params["head"][:, rows:], np.tile(expected.mean(1)[:, None], 512 - rows), atol=1e-6)
    gin = (tmp_path / "out" / "model.gin").read_text()
    for setting in ("activation = 'silu'", "tie_embeddings = False", "num_heads = 2", "head_dim = 4"):
        assert f"  {setting}\n" in gin


def test_the_command_of_the_page_on_a_model_with_tied_embeddings(tmp_path, tokenizer, monkeypatch):
    write_checkpoint(tmp_path / "checkpoint_1000000", target(head=False))
    shutil.copyfile(tokenizer, tmp_path / "t5_vocab.model")
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(
        r"python -m diffusion_t5x.convert (from_t5x .*)", by_module(PAGE.read_text(encoding="utf-8"))
    )
    convert(shlex.split(command.replace("/tmp/", f"{tmp_path}/")))
    definition, params = load_ours(tmp_path / "t5", "t5_vocab.model")
    assert "head" not in params and definition.config.tie_embeddings
    assert definition.config.readout_scale == EMBED**-0.5


BAD_SHAPE = {"encoder/layers_1/mlp/wo/kernel": np.zeros((MLP, EMBED + 1), np.float32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (BAD_SHAPE, r"layers_1/mlp/wo/kernel has the shape \(12, 9\), and the rest .* asks for \(12, 8\)"),
        ({"token_embedder/embedding": np.zeros(3, np.float32)}, r"has the shape \(3,\), and should be a matrix"),
        ({"token_embedder/embedding": None}, "lacks token_embedder/embedding, which every T5 1.1 has"),
        ({"decoder/layers_0/mlp/wi_1/kernel": None}, r"lacks tensors that T5 1\.1 has: .*layers_0/mlp/wi_1/kernel\."),
        ({"encoder/prompt/scale": np.ones(2, np.float32)}, "has tensors that are not known here: encoder/prompt/scale"),
        ({"decoder/layers_2/a": np.ones(2, np.float32)}, "an encoder of 2 layers and a decoder of 3"),
        ({"decoder/relpos_bias/rel_embedding": np.ones((3, BUCKETS), np.float32)}, "8 columns .* into the 3 heads"),
        ({"decoder/decoder_norm/scale": np.ones(EMBED, np.int32)}, "decoder_norm/scale is int32; only float32"),
        ({"decoder/decoder_norm/scale": "PLACEHOLDER"}, "decoder_norm/scale is not an array, but 'PLACEHOLDER'"),
        ({"decoder/decoder_norm/scale": {"driver": "n5", "kvstore": {"path": "a"}}}, "is not a zarr array with a path"),
        ({"decoder/decoder_norm/scale": {"driver": "zarr", "kvstore": {}}}, "is not a zarr array with a path"),
    ],
)
def test_checkpoints_that_are_refused(changes, message, tmp_path, tokenizer):
    arrays = {name: array for name, array in (target() | changes).items() if array is not None}
    source = write_checkpoint(tmp_path / "source", arrays)
    with pytest.raises(UserError, match=message):
        import_model(source, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arrays_beside_that_are_refused(tmp_path, tokenizer):
    name, array = "decoder/decoder_norm/scale", np.ones(EMBED, np.float32)
    said = write_zarr(tmp_path / "elsewhere", "norm", array)

    def refuses(changes, message, path=None):
        leaf = said | changes | ({"kvstore": {"driver": "file", "path": path}} if path else {})
        source = write_checkpoint(tmp_path / "source", target() | {name: leaf})
        with pytest.raises(UserError, match=message):
            import_model(source, tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    outside = "scale lies outside the checkpoint's folder"
    refuses({}, outside, "../elsewhere/norm")
    refuses({}, outside, str(tmp_path / "elsewhere" / "norm"))
    refuses({}, outside, ".")
    refuses({}, "cannot read the array .*scale in 'norm': .*zarray.* does not exist", "norm")
    refuses({}, "cannot read the array .*null", "a\0b")
    (tmp_path / "source" / "link").symlink_to(tmp_path / "elsewhere" / "norm")
    refuses({}, outside, "link")
    write_zarr(tmp_path / "source", "norm", array)
    chunk = tmp_path / "source" / "norm" / "1"
    whole = chunk.read_bytes()
    chunk.unlink()
    refuses({}, "files of the array .*scale are missing in 'norm'")
    chunk.symlink_to(tmp_path / "elsewhere" / "norm" / "1")
    refuses({}, outside)
    chunk.unlink()
    chunk.write_bytes(whole)
    refuses({"metadata": {"shape": [EMBED + 1]}}, r"has the shape \(8,\), and checkpoint says \(9,\)")
    chunk.write_bytes(whole[:12])
    refuses({}, "cannot read decoder/decoder_norm/scale: .*norm/1")


def test_arrays_larger_than_their_files_are_refused_at_once(tmp_path, tokenizer):
    name, array = "decoder/decoder_norm/scale", np.ones(EMBED, np.float32)
    source = write_checkpoint(tmp_path / "source", target())
    said = write_zarr(source, "norm", array)
    header = json.loads((source / "norm" / ".zarray").read_text())
    for size, chunk, message in (
        (2**40, 4, "are missing"),
        (2**40, 2**40, "cannot contain"),
        (2**40, 2**39, "cannot contain"),
    ):
        (source / "norm" / ".zarray").write_text(json.dumps(header | {"shape": [size], "chunks": [chunk]}))
        leaf = said | {"metadata": {"shape": [size]}}
        (source / "checkpoint").unlink()
        write_checkpoint(source, target() | {name: leaf})
        with pytest.raises(UserError, match=message):
            import_model(source, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(value, tmp_path, tokenizer):
    name = "decoder/decoder_norm/scale"
    source = write_checkpoint(tmp_path / "source", target() | {name: np.full(EMBED, value, np.float32)})
    with pytest.raises(UserError, match=f"{name} has numbers that are NaN or infinite"):
        import_model(source, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_refused(tmp_path, tokenizer):
    source = write_checkpoint(tmp_path / "checkpoint_7", target())

    def refuses(message, folder=source, file=tokenizer, output="out"):
        with pytest.raises(UserError, match=message):
            import_model(folder, file, tmp_path / output)

    refuses("Cannot read .*/checkpoint: No such file.* Name one of .* such as checkpoint_7", tmp_path)
    refuses("There is no vocabulary file", file=tmp_path / "nowhere.model")
    (tmp_path / "other.model").write_text("text")
    refuses("other.model is not a SentencePiece model", file=tmp_path / "other.model")
    refuses("checkpoint_7 is not empty", output="checkpoint_7")
    smaller = write_checkpoint(tmp_path / "smaller", target(rows=PIECES - 1))
    refuses(r"t5\.model has pieces up to id 329, but .*smaller is a model of 329 ids", smaller)
    whole = (source / "checkpoint").read_bytes()
    (source / "checkpoint").write_bytes(whole[:-100])
    refuses("checkpoint is broken, or not a T5X checkpoint")
    (source / "checkpoint").write_bytes(serialization.msgpack_serialize({"params": {"a": np.ones(2)}}))
    refuses("is not a T5X checkpoint: it has no optimizer/target/")
