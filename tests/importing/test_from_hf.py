"""Imports from the format of Hugging Face without torch: what is refused, the way back, memory."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import open_models
import pytest
import sentencepiece
import tokenizers
from in_torch import load_ours
from pages import by_module, write_gin_files

from diffusion_t5x.command_line import config
from diffusion_t5x.convert import convert
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing.weights import Weight, table, vector
from diffusion_t5x.train import train

pytest.importorskip("seqio")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "convert.md"
EMBED, MLP, HEADS, KV, HEAD_DIM, IDS = 16, 24, 4, 2, 8, 310
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": EMBED,
    "intermediate_size": MLP,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "max_position_embeddings": 64,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": IDS,
}


def shapes(layers, embed=EMBED, mlp=MLP, head_dim=HEAD_DIM):
    block = {
        "input_layernorm": (embed,),
        "post_attention_layernorm": (embed,),
        "self_attn.q_proj": (HEADS * head_dim, embed),
        "self_attn.k_proj": (KV * head_dim, embed),
        "self_attn.v_proj": (KV * head_dim, embed),
        "self_attn.o_proj": (embed, HEADS * head_dim),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (mlp, embed),
        "mlp.up_proj": (mlp, embed),
        "mlp.down_proj": (embed, mlp),
    }
    found = {"model.embed_tokens.weight": (IDS, embed), "model.norm.weight": (embed,)}
    return found | {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}


def write_source(folder, changes=None, tensors=None):
    """A Qwen3 in a folder; `changes` to its config.json, `tensors` in place of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes(2).items()}
    values |= tensors or {}
    open_models.save_shards(folder, {name: value for name, value in values.items() if value is not None}, shards=2)
    (folder / "config.json").write_text(json.dumps(QWEN3 | (changes or {})))
    open_models.save_tokenizer(folder, open_models.byte_level(), eos_token="<|end|>")
    return folder


def import_model(folder, output):
    convert(["from_hf", str(folder), "--output", str(output)])


@pytest.mark.parametrize("index", [{}, {"weight_map": {"w": "../model.safetensors"}}, {"weight_map": {"w": "/model"}}])
def test_an_index_names_files_beside_it(index, tmp_path):
    source = write_source(tmp_path / "source")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"index\.json: weight_map should name files beside it, not (None|'\.\./|'/model)"
    ):
        import_model(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen_3"}, r"model_type = 'qwen_3' is not supported, only .*qwen3.* Did you mean 'qwen3'"),
        ({"attention_bias": True}, r"config\.json: attention_bias = true is not supported, only false"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported, only "silu"'),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has sliding_attention, but there is no",
        ),
        ({"layer_types": ["full_attention", "linear_attention"]}, '"linear_attention" in layer_types'),
        ({"rope_scaling": {"rope_type": "longrope"}}, 'rope_scaling: rope_type = "longrope" is not supported'),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "beta": 1}}, "rope_scaling has keys .*beta = 1"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        (
            {"quantization_config": {"bits": 4}, "use_mrope": True},
            'quantization_config = {"bits": 4}, use_mrope = true',
        ),
        ({"num_hidden_layers": None}, "has no 'num_hidden_layers'"),
        ({"num_hidden_layers": 3}, r"lacks tensors that qwen3 has: model\.layers\.2\..*, and 6 more"),
        ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers = 1000000000, but the files hold only 24 tensors"),
        ({"num_hidden_layers": 1e9}, r"num_hidden_layers = 1000000000\.0 should be a positive whole number"),
        ({"hidden_size": 2**40}, r"embed_dim must be from 1 to 1,000,000"),
        ({"head_dim": 2**40}, r"head_dim must be from 1 to 1,000,000"),
        ({"num_attention_heads": 2**40}, r"num_heads must be from 1 to 1,000,000"),
        ({"num_key_value_heads": 2**40}, "must be a multiple of num_kv_heads"),
        ({"vocab_size": 2**40}, r"has the shape .*asks for"),
        ({"intermediate_size": 10**18}, r"mlp_dim must be from 1 to 1,000,000"),
        ({"num_hidden_layers": 1}, r"has tensors that are not known here: model\.layers\.1\."),
        ({"intermediate_size": 25}, r"mlp\.gate_proj\.weight has the shape \(24, 16\), .* asks for \(25, 16\)"),
        ({"tie_word_embeddings": False}, r"lacks tensors that qwen3 has: lm_head\.weight"),
        ({"vocab_size": 200}, "has pieces up to id 299, but .* is a model of 200 ids"),
    ],
)
def test_configs_that_are_refused(changes, message, tmp_path):
    source = write_source(tmp_path / "source", changes)
    with pytest.raises(UserError, match=message):
        import_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_refused(tmp_path):
    source = write_source(tmp_path / "source")
    shard = source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()

    def refuses(message, output="out"):
        with pytest.raises(UserError, match=message):
            import_model(source, tmp_path / output)
        assert not (tmp_path / "out").exists()

    shard.write_bytes(whole[:-100])
    refuses("00002-of-00002.safetensors is broken")
    shard.unlink()
    (source / "pytorch_model.bin").write_text("")
    refuses("is missing. There is pytorch_model.bin: save the model as safetensors first")
    shard.write_bytes(whole)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    refuses("full is not empty", "full")
    (source / "tokenizer.json").unlink()
    refuses("has no tokenizer")
    (source / "config.json").write_text("{")
    refuses(r"config\.json: not JSON")
    with pytest.raises(UserError, match=r"Cannot read .*nowhere/config\.json"):
        import_model(tmp_path / "nowhere", tmp_path / "out")
    integers = {"model.norm.weight": np.zeros(EMBED, np.int8)}
    with pytest.raises(UserError, match=r"model\.norm\.weight is I8; only F32, BF16, F16"):
        import_model(write_source(tmp_path / "quantised", tensors=integers), tmp_path / "out")


def test_a_head_that_differs_is_not_tied_whatever_the_config_says(tmp_path, capsys):
    embedding = np.random.default_rng(0).standard_normal((IDS, EMBED)).astype(np.float32)
    for name, head in (("same", embedding), ("other", embedding + 1)):
        tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
        import_model(write_source(tmp_path / name, tensors=tensors), tmp_path / f"{name}_out")
        assert ("lm_head.weight" in capsys.readouterr().out) == (name == "other")
        convert(["to_hf", str(tmp_path / f"{name}_out"), "--output", str(tmp_path / f"{name}_back")])
        back = open_models.read_shards(tmp_path / f"{name}_back")
        np.testing.assert_array_equal(back["lm_head.weight"], head)


def test_the_way_back_needs_the_model_that_was_imported(tmp_path, monkeypatch):
    import_model(write_source(tmp_path / "source"), tmp_path / "out")
    (tmp_path / "run").mkdir()
    (tmp_path / "out" / "checkpoints").rename(tmp_path / "run" / "checkpoints")
    back = ["--output", str(tmp_path / "back")]
    with pytest.raises(UserError, match=r"not a folder that from_hf wrote .* --like"):
        convert(["to_hf", str(tmp_path / "run"), *back])
    narrow = {name: np.ones(shape, np.float32) for name, shape in shapes(2, head_dim=4).items()}
    import_model(write_source(tmp_path / "narrow", {"head_dim": 4}, narrow), tmp_path / "other")
    with pytest.raises(UserError, match="of another model than the one that was imported: decoder/blocks/attention"):
        convert(["to_hf", str(tmp_path / "run"), "--like", str(tmp_path / "other"), *back])
    monkeypatch.setattr("diffusion_t5x.importing.to_hf.MAX_FILE_BYTES", 8_000)
    convert(["to_hf", str(tmp_path / "run"), "--like", str(tmp_path / "out"), *back])
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    expected, found = open_models.read_shards(tmp_path / "source"), open_models.read_shards(tmp_path / "back")
    assert set(index["weight_map"].values()) == set(files) and index["weight_map"].keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch):
    """As they stand, with paths below a folder of the test's, and smaller numbers."""
    write_source(tmp_path / "Qwen3-0.6B")
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "text.txt").write_text(
        "\n\n".join(f"Once upon {i} times there was a model." for i in range(2000))
    )
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    write_gin_files(page, tmp_path)
    block, *_ = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = by_module(block).replace("/tmp/", f"{tmp_path}/").splitlines()
    importing, training, exporting = (shlex.split(command)[3:] for command in commands)
    convert(importing)
    small = ["--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=2", '--gin.TASK_FEATURE_LENGTHS={"inputs": 16, "targets": 16}']
    config.run(train, [*training, *small, "--gin_file=hardware/cpu.gin"])
    convert(exporting)
    before, after = (open_models.read_shards(tmp_path / name) for name in ("Qwen3-0.6B", "qwen3_back"))
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape and (before[name] != after[name]).any() for name in before)


def test_weights_lie_there_as_they_are_said_to():
    array = np.arange(24.0).reshape(2, 3, 4)
    out = Weight("w", "w", inputs=2)
    assert out.their_shape(array.shape) == (4, 6) and out.to_theirs(array)[1, 5] == array[1, 2, 1]
    query = Weight("w", "w")
    assert query.their_shape(array.shape) == (12, 2) and query.to_theirs(array)[7, 1] == array[1, 1, 3]
    for weight in (out, query, table("w", "w"), vector("w", "w")):
        theirs = weight.to_theirs(array)
        assert theirs.shape == weight.their_shape(array.shape)
        np.testing.assert_array_equal(weight.to_ours(theirs, array.shape), array)


MEASURE = """
import re, sys
from diffusion_t5x.convert import convert
small, large, output = sys.argv[1:]
def peak():  # of this process; what rusage says is the parent's as well
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
convert(["from_hf", small, "--output", output + "/small"])
before = peak()
convert(["from_hf", large, "--output", output + "/large"])
print("GROWTH", peak() - before)
"""


@pytest.mark.parametrize(
    ("gigabytes", "shards"), [pytest.param(0.8, 4, marks=pytest.mark.slow), pytest.param(4, 8, marks=pytest.mark.long)]
)
def test_peak_memory_stays_below_two_shards(gigabytes, shards, tmp_path):
    """Some 150 MB of the limit are for tensorstore and the checksums."""
    embed, mlp = 1024, 4096
    layers = round(gigabytes * 20)
    small, large = write_source(tmp_path / "small"), write_source(tmp_path / "large")
    open_models.edit_config(large, hidden_size=embed, intermediate_size=mlp, num_hidden_layers=layers)
    for file in large.glob("*.safetensors"):
        file.unlink()
    rng = np.random.default_rng(0)
    names = shapes(layers, embed, mlp)
    weight_map, sizes = {}, []
    for number in range(shards):
        mine = [n for n in names if (int(n.split(".")[2]) * shards // layers if "layers" in n else 0) == number]
        file = f"model-{number}.safetensors"
        tensors = {name: rng.standard_normal(names[name], np.float32) for name in mine}
        open_models.safetensors.numpy.save_file(tensors, large / file)
        weight_map |= dict.fromkeys(mine, file)
        sizes.append((large / file).stat().st_size)
    (large / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    growth = 1024 * int(done.stdout.split("GROWTH")[1])
    print(f"{sum(sizes):,} bytes in {shards} shards of at most {max(sizes):,}: {growth:,} bytes more at the peak")
    assert sum(sizes) > gigabytes * 1e9 and growth < 2 * max(sizes)


def test_keys_that_are_ignored(tmp_path):
    """They are as if not there, for the way back as well; a name that is no key is an error."""
    changes = {"quantization_config": {"bits": 4}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "router": 1}
    source = write_source(tmp_path / "source", changes)
    command = ["from_hf", str(source), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"--ignore_keys=quantization_config\."):
        convert([*command, "--ignore_keys=rope_scaling"])
    with pytest.raises(UserError, match=r"has no key 'rope_scalin'\. Did you mean 'rope_scaling'"):
        convert([*command, "--ignore_keys=rope_scalin"])
    assert not (tmp_path / "out").exists()
    convert([*command, "--ignore_keys=quantization_config,rope_scaling"])
    convert(["to_hf", str(tmp_path / "out"), "--output", str(tmp_path / "back")])
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not (tmp_path / "back" / "ignored_keys.json").exists()


def test_keys_that_are_passed_over_are_said_in_one_line(tmp_path, capsys):
    import_model(write_source(tmp_path / "source", {"use_mrope": False, "router": 1}), tmp_path / "out")
    line, *rest = capsys.readouterr().out.splitlines()
    assert "use_mrope = false; and passed over, as transformers does not read them for this family: router = 1." in line
    assert rest[0].startswith("model.embed_tokens.weight")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_numbers_that_are_none_are_refused(name, value, tmp_path):
    array = np.ones((shapes(2) | {"": ()})[name], np.float32)
    array[-1] = value
    source = write_source(tmp_path / "source", tensors={name: array})
    with pytest.raises(UserError, match=rf"{re.escape(name)} has numbers that are NaN or infinite"):
        import_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_two_places_for_tensors_the_one_of_transformers_counts(tmp_path):
    source = write_source(tmp_path / "source")
    tensors = open_models.read_shards(source)
    first, *_ = sorted(source.glob("model-*.safetensors"))
    twice = open_models.safetensors.numpy.load_file(first) | {"model.norm.weight": np.ones(EMBED, np.float32)}
    open_models.safetensors.numpy.save_file(twice, first)
    with pytest.raises(UserError, match=r"model\.norm\.weight is in several files, such as model-00002-of-00002"):
        import_model(source, tmp_path / "out")
    tensors["model.norm.weight"] = np.full(EMBED, 3, np.float32)
    open_models.save_shards(source, tensors)  # one file, which comes before an index
    import_model(source, tmp_path / "out")
    convert(["to_hf", str(tmp_path / "out"), "--output", str(tmp_path / "back")])
    assert (open_models.read_shards(tmp_path / "back")["model.norm.weight"] == 3).all()


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("where", ["folder", "cache", "cache of another model"])
def test_links_that_lead_out_are_refused(name, where, tmp_path):
    """As the hub's cache has them, links from a model's snapshot to its blobs do not lead out."""
    cache = tmp_path / "hub"
    folder = cache / "models--org--name" / "snapshots" / "0123abcd"
    folder.parent.mkdir(parents=True)
    write_source(folder)
    blobs = cache / "models--org--name" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(pathlib.Path("..", "..", "blobs", str(number)))
    (tmp_path / "link").symlink_to(folder)
    import_model(tmp_path / "link", tmp_path / "out")
    secret = tmp_path / "secret"
    if where == "cache of another model":
        secret = cache / "models--org--other" / "blobs" / "0"
        secret.parent.mkdir(parents=True)
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"a secret")
    if where == "folder":
        shutil.copytree(folder, folder := tmp_path / "plain")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is a link that leads out of .*: replace it"):
        import_model(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_no_file_is_refused(tmp_path):
    source = write_source(tmp_path / "source")
    (source / "merges.txt").mkdir()
    with pytest.raises(UserError, match=r"merges\.txt is not a regular file"):
        import_model(source, tmp_path / "out")


def test_of_two_tokenizers_that_differ_the_one_of_transformers_counts(tmp_path, capsys):
    """T5's spiece.model comes first where both have the same pieces."""
    source = write_source(tmp_path / "source")
    open_models.save_sentencepiece(source / "spiece.model", vocab_size=300, hard_vocab_limit=True)
    import_model(source, tmp_path / "out")
    assert "spiece.model is ignored, as in transformers: tokenizer.json has different" in capsys.readouterr().out
    assert "out/tokenizer.json'" in (tmp_path / "out" / "model.gin").read_text()
    model = sentencepiece.SentencePieceProcessor(model_file=str(source / "spiece.model"))
    pieces = [(model.IdToPiece(number), 0.0) for number in range(300)]
    open_models.save_tokenizer(source, tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 2)), eos_token="</s>")
    import_model(source, tmp_path / "same")
    assert "passed over" not in capsys.readouterr().out
    assert "same/spiece.model'" in (tmp_path / "same" / "model.gin").read_text()


def test_tokens_that_were_added_to_a_t5_are_kept(tmp_path):
    """A newline behind the pieces keeps its id and its row, and MASK is a new one."""
    source = write_source(tmp_path / "source", {"vocab_size": IDS})
    (source / "tokenizer.json").unlink()
    open_models.save_sentencepiece(source / "spiece.model", vocab_size=308, hard_vocab_limit=True)
    (source / "added_tokens.json").write_text(json.dumps({"\n": 308, "{": 309}))
    import_model(source, tmp_path / "out")
    definition, params = load_ours(tmp_path / "out", "spiece.model")
    assert definition.vocabulary.mask_id == IDS
    expected = open_models.read_shards(source)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embedding"][:IDS], expected)
    np.testing.assert_allclose(params["embedding"][IDS], expected.mean(0), atol=1e-6)
