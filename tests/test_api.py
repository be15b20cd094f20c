"""The Python interface: it writes and scores what the verbs do, and trains without gin."""

import ast
import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import gin
import numpy as np
import open_models
import pytest
import safetensors.numpy
from compiled_programs import compiled

import diffusion_t5x as dt
from diffusion_t5x import api_decoding, generate, infer
from diffusion_t5x.checkpointing.rebuilding import rebuild
from diffusion_t5x.checkpointing.record import describe
from diffusion_t5x.command_line import config
from diffusion_t5x.data import stop_strings
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.in_slots import SlotDecoding

seqio = pytest.importorskip("seqio")
from untrained import LENGTHS, SIZE, give_record, untrained  # noqa: E402

PROMPTS = ["one", "", "été"]
BYTES = {"file": None, "extra_ids": 100}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "masked"
    untrained(folder, "objectives/masked.gin", "decoding/masked.gin", form="new")
    give_record(folder, vocabulary_source=BYTES, inputs_end=True)
    return folder


@pytest.fixture(scope="module")
def model(masked):
    return dt.load(masked)


def test_the_package_is_light_and_its_names_are_there():
    assert callable(dt.train) and dt.train.train is not None  # the module, which can be called
    assert {"load", "train", "Model", "Sundae"} <= set(dir(dt))
    for name in dt.__all__:
        assert getattr(dt, name) is not None
    tree = ast.parse(pathlib.Path(dt.__file__).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert {alias.name for statement in typed.body for alias in statement.names} == {*dt.__all__} - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        dt.lod  # noqa: B018
    code = "import diffusion_t5x, sys; print({'jax', 'tensorflow', 'seqio'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_it_writes_what_generate_writes(masked, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{prompt}\n" for prompt in PROMPTS)))
    capsys.readouterr()
    generate.main(["--checkpoint", str(masked), "--seed", "5", "--samples", "2"])
    expected = capsys.readouterr().out.splitlines()
    written = model.generate(PROMPTS, seed=5, samples=2)
    lines = [text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for pair in written for text in pair]
    assert lines == expected
    assert model.generate(PROMPTS, seed=5) == [first for first, _ in written]
    assert model.generate("one", seed=5) == written[0][0] and model.generate([]) == []
    steps = model.trace("one", seed=5)
    assert steps.text == written[0][0] and len(steps.canvases) > 2 and set(steps.canvases[0]) == {"▢"}
    assert steps.canvases[-1].startswith(steps.text)
    assert steps._repr_html_().startswith("<iframe srcdoc=") and "<script" not in steps._repr_html_()


@pytest.fixture
def in_slots(monkeypatch):
    """A list that grows with each call that decodes in slots."""
    calls, decode = [], SlotDecoding.decode
    monkeypatch.setattr(SlotDecoding, "decode", lambda *given: (calls.append(given), decode(*given))[1])
    return calls


SAMPLING = dt.MaskedDecoder(num_steps=4, temperature=1.0)
MANY = [f"{n}" * (n % 4) for n in range(10)]


@pytest.mark.parametrize(
    "write",
    [
        lambda model: model.generate(MANY, decoder=SAMPLING, samples=2),
        pytest.param(
            lambda model: model.fill([f"{n}<hole:{1 + n % 3}>c" for n in range(10)], "one", decoder=SAMPLING, seed=2),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["generate", "fill"],
)
def test_many_texts_are_decoded_in_slots(write, model, in_slots, monkeypatch):
    found = write(model)
    assert len(in_slots) == 1 and len(set(map(str, found))) > 8
    monkeypatch.setattr(api_decoding, "_SLOTS", 10)  # one by one
    assert write(model) == found and len(in_slots) == 1


@pytest.mark.slow
def test_stop_strings_end_texts(masked, model, in_slots):
    anyhow = dt.load(masked, allow_mismatch=True)
    for decoder in (AutoregressiveDecoder(temperature=1.0), None):  # in order; a canvas, which is written whole
        whole = anyhow.generate(MANY[1:4], decoder=decoder)
        stops = [whole[0][2:4], whole[1][1:2]]
        cut = anyhow.generate(MANY[1:4], decoder=decoder, stop=stops)
        assert cut == [stop_strings.trim(text, stops).text for text in whole] and cut[0] != whole[0]
        assert anyhow.generate(MANY[1], decoder=decoder, stop=stops) == cut[0]
        assert len(in_slots) == 2  # by the first decoder
    with pytest.raises(UserError, match="stop takes texts of at least one character"):
        model.generate("one", stop="a")
    with pytest.raises(UserError, match="stop would cut the text"):
        model.generate("one", stop=["a"], regex="[ab]*")


def test_it_fills_and_scores_what_infer_does(masked, model, tmp_path, monkeypatch):
    pairs = [("a<hole:2>c", "one"), ("<hole:3>é", "two")]
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps({"inputs": inputs, "targets": text}) + "\n" for text, inputs in pairs), encoding="utf-8"
    )
    (tmp_path / "holes.jsonl").write_text(
        "".join(json.dumps({"inputs": inputs, "template": text}) + "\n" for text, inputs in pairs), encoding="utf-8"
    )
    files = ("models/decoder_only.gin", "sizes/tiny.gin", "objectives/masked.gin", "decoding/masked.gin")
    flags = [
        *(f"--gin_file={file}" for file in (*files, "runs/infer.gin", "tasks/local_jsonl.gin")),
        *(f"--gin.ModelConfig.{name}={value}" for name, value in SIZE.items()),
        *(f"--gin.CHECKPOINT_PATH={masked}", f"--gin.INFER_OUTPUT_DIR={tmp_path}", "--gin.BATCH_SIZE=2"),
        *(f'--gin.FILES={{"test": "{tmp_path}/test.jsonl"}}', f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}"),
        *("--gin.RANDOM_SEED=3", "--gin.VOCABULARY_FILE=None"),
    ]
    config.run(infer.infer, [*flags, f"--gin.infer.infer.templates='{tmp_path}/holes.jsonl'"])
    config.run(
        infer.infer,
        [
            *flags,
            "--gin.infer.infer.mode='score'",
            "--gin.infer.infer.objective=%OBJECTIVE",
            "--gin.infer.infer.num_draws=4",
        ],
    )
    texts, inputs = zip(*pairs, strict=True)
    filled = [json.loads(line) for line in (tmp_path / "infill-holes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert model.fill(texts, inputs, seed=3) == [record["prediction"] for record in filled]
    assert model.fill(texts[0], inputs[0], seed=3) == filled[0]["prediction"]
    scored = (tmp_path / "local-test-score.jsonl").read_text(encoding="utf-8").splitlines()
    found = model.log_likelihood(texts, inputs, num_draws=4, seed=3)
    for record, measured in zip(map(json.loads, scored), found, strict=True):
        assert measured.num_tokens == record["num_tokens"]
        np.testing.assert_allclose(measured.nats, record["log_likelihood"], rtol=1e-6)
        np.testing.assert_allclose(measured.standard_error, record["standard_error"], rtol=1e-5)
    gin.clear_config()


def test_other_seeds_compile_nothing(model):
    decoder = dt.MaskedDecoder(num_steps=4, temperature=1.0)

    def answer(seed):
        return model.generate("one", decoder=decoder, seed=seed), model.log_likelihood("a", "b", num_draws=4, seed=seed)

    first = answer(1)
    with compiled() as names:
        others = [answer(seed) for seed in (2, 3, -4)]
        assert answer(1) == first
    assert names == []
    assert len({text for text, _ in [first, *others]}) == len({found.nats for _, found in [first, *others]}) == 4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: model.generate("x" * 40), "it has 41 tokens"),
        (lambda model: model.generate("a", samples=0), "samples must be at least 1, not 0"),
        (lambda model: model.generate("a", length=0), "length must be at least 1, not 0"),
        (lambda model: model.generate([1]), "Texts are str, or a list of str; got 1"),
        (lambda model: model.generate("a", decoder=dt.SundaeDecoder()), "allow_mismatch=True"),
        (lambda model: model.fill("no hole"), "Text 0: the template has no hole"),
        (lambda model: model.fill("a<hole:30>"), "Text 0: template of 32 tokens"),
        (lambda model: model.fill(["a<hole:1>"], ["b", "c"]), "1 texts, but 2 inputs"),
        (lambda model: model.fill("<hole:1>", decoder=dt.AutoregressiveDecoder()), "AutoregressiveDecoder"),
        (
            lambda model: model.log_likelihood("x" * 12),
            "The targets of text 0 have 13 tokens, EOS included",
        ),
        (lambda model: model.log_likelihood("x", num_draws=3), "even"),
        (lambda model: model.log_likelihood("x", objective=dt.Sundae()), "the model is trained for"),
    ],
)
def test_mistakes(model, call, said):
    with pytest.raises(UserError, match=said):
        call(model)


def test_what_a_checkpoint_may_name(masked, tmp_path):
    decoder = dt.BlockDecoder(block_size=3)
    assert rebuild(describe(decoder), "x") == decoder
    for described, said in (
        ({"class": "subprocess.Popen", "args": ["true"]}, r"give allow=\['subprocess'\]"),
        ({"class": "diffusion_t5x.__main__.Main"}, "not a part of diffusion_t5x"),
        ({"class": "diffusion_t5x.decoding.masked.nothing"}, "which does not exist"),
        ({"class": "diffusion_t5x.decoding.masked.UserError"}, "no dataclass of"),
        ({"class": "diffusion_t5x.decoding.masked.MaskedDecoder", "other": 1}, "different settings of MaskedDecoder"),
    ):
        with pytest.raises(UserError, match=said):
            rebuild(described, "A record")
    unknown = shutil.copytree(masked, tmp_path / "unknown")
    give_record(unknown, vocabulary_source=None, decoder=None)
    with pytest.raises(UserError, match="does not say how its vocabulary is made: give vocabulary=FILE"):
        dt.load(unknown)
    opened = dt.load(unknown, vocabulary=seqio.ByteVocabulary(extra_ids=100))
    with pytest.raises(UserError, match=r"does not say which decoder suits it: give decoder=\.\.\."):
        opened.generate("a")
    with pytest.raises(UserError, match=r"No checkpoint at .*nowhere"):
        dt.load(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny Llama in a hub's cache, as `huggingface_hub` lays it out."""
    cache = tmp_path_factory.mktemp("hub")
    folder = cache / "models--someone--tiny-llama" / "snapshots" / ("0" * 40)
    open_models.save_tokenizer(
        folder, open_models.byte_level(), eos_token="<|end|>", bos_token="<|end|>", pad_token="<|pad|>"
    )
    settings = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "hidden_act": "silu"}
    settings |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(settings))
    layer = "model.layers.0"
    shapes = {"model.embed_tokens.weight": (300, 16), "lm_head.weight": (300, 16), "model.norm.weight": (16,)}
    shapes |= {f"{layer}.self_attn.{x}_proj.weight": (16, 16) for x in "qkvo"}
    shapes |= {f"{layer}.mlp.{x}_proj.weight": (32, 16) for x in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj.weight": (16, 32)}
    shapes |= {f"{layer}.{x}_layernorm.weight": (16,) for x in ("input", "post_attention")}
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reference = cache / "models--someone--tiny-llama" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("0" * 40)
    return cache


@pytest.fixture
def offline(monkeypatch, published):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(published))


@pytest.mark.slow
def test_a_model_of_the_hub(offline, published, tmp_path):
    from diffusion_t5x.importing.from_hf import from_hf

    model = dt.load("someone/tiny-llama")
    assert model.name == "someone/tiny-llama" and model.record.imported
    from_hf("someone/tiny-llama@main", str(tmp_path / "imported"))
    imported = dt.load(tmp_path / "imported")
    assert model.generate("Once", length=8) == imported.generate("Once", length=8)
    likelihoods = [each.log_likelihood(" upon", "Once") for each in (model, imported)]
    assert likelihoods[0] == likelihoods[1] and likelihoods[0].standard_error == 0
    folder = next((published / "models--someone--tiny-llama" / "snapshots").iterdir())
    assert dt.load(folder).generate("Once", length=8) == model.generate("Once", length=8)
    with pytest.raises(UserError, match=r"There is no folder someone/other, .*HF_HUB_OFFLINE is set"):
        dt.load("someone/other")
    with pytest.raises(UserError, match=r"There is no folder someone/tiny-llama@old, .* does not have the model"):
        from_hf("someone/tiny-llama@old", str(tmp_path / "old"))


@pytest.mark.slow
def test_training_without_gin(tmp_path):
    from diffusion_t5x.tasks import local_files, readers

    (tmp_path / "train.jsonl").write_text('{"inputs": "a", "targets": "b"}\n' * 8)
    local_files.task("api_pairs", {"train": str(tmp_path / "train.jsonl")}, readers.Jsonl(), None)
    gin.clear_config()  # as in a fresh interpreter
    settings = {
        "model_dir": str(tmp_path / "run"),
        "model": dt.ModelConfig(**SIZE),
        "objective": dt.Sundae(),
        "train_dataset": dt.SeqioDataset("api_pairs", {"inputs": 8, "targets": 6}, batch_size=8),
        "optimizer": dt.adamw(1e-3),
        "metric_writers": ("jsonl",),
    }
    dt.train(**settings, train_steps=1)
    assert (tmp_path / "run" / "config.gin").read_text().startswith("# This run was started from Python, without gin.")
    dt.train(**settings, train_steps=2)  # goes on
    model = dt.load(tmp_path / "run")
    assert isinstance(model.objective, dt.Sundae) and isinstance(model.decoder, dt.SundaeDecoder)
    assert dataclasses.replace(model.config, vocab_size=None) == dt.ModelConfig(**SIZE)
    assert isinstance(model.generate("a"), str)
    with pytest.raises(UserError, match=r"train\.objective is Masked"):
        dt.train(**settings | {"objective": dt.Masked()}, train_steps=3)
    generate.main(["--checkpoint", str(tmp_path / "run"), "--prompt", "a", "--print_config"])


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((pathlib.Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb")))
def test_a_notebook(file, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(file.parents[2]), *sys.path]))
    notebook = nbformat.read(file, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert any("<iframe srcdoc=" in str(cell.get("outputs")) for cell in notebook.cells)
