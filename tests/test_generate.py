"""The verb as users run it: in a pipe, with checkpoints of every kind, and every mistake."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import sys

import open_models
import pytest
import tiny
from pages import by_module
from variants import quick

from diffusion_t5x import generate, infer, train
from diffusion_t5x.chat.conversation import one_line
from diffusion_t5x.chat.prompts import Prompts, prompt_lengths
from diffusion_t5x.command_line import config
from diffusion_t5x.convert import convert
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.vocabularies import to_text, token_ids
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.importing import output
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.agreement import Agreement

seqio = pytest.importorskip("seqio")
from untrained import LENGTHS, RUN, SIZE, give_record, save_old, untrained  # noqa: E402

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "generate.md"
PROMPTS = ["one", "", "été"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("masked"), "objectives/masked.gin", "decoding/masked.gin")


@pytest.fixture(scope="module")
def stories(test_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "stories"
    files = [test_data / "stories260k" / name for name in ("stories260K.bin", "tok512.bin")]
    convert(["from_llama2c", str(files[0]), "--tokenizer", str(files[1]), "--output", str(folder)])
    return folder


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs the verb with lines on standard input; gives what it writes to standard output and to standard error."""

    def ask(checkpoint, *flags, lines=()):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        generate.main(["--checkpoint", str(checkpoint), *flags])
        return capsys.readouterr()

    return ask


@pytest.fixture
def refused(ask, capsys):
    def refused(*arguments, **lines):
        with pytest.raises(SystemExit) as ended:
            ask(*arguments, **lines)
        assert ended.value.code == 2
        return capsys.readouterr().err

    return refused


def test_an_imported_model_writes_the_published_text(stories, test_data, ask):
    expected = (test_data / "stories260k" / "expected_greedy.txt").read_text(encoding="utf-8").removesuffix("\n")
    begin = "Once upon a time"
    written = ask(stories, lines=["", begin])
    assert written.out.splitlines()[0] == one_line(expected) and "\\n" in written.out
    assert written.out.splitlines()[1].startswith(one_line(expected.removeprefix(begin).lstrip())[:200])
    settings, how, first, second = written.err.splitlines()
    assert re.search(r"stories, step 0, imported: \d{3},\d{3} parameters on cpu$", settings)
    assert (
        how.startswith("AutoregressiveDecoder(temperature=0.0") and "), 256 tokens after at most 256 of a prompt" in how
    )
    figures = r"256 tokens in [\d.]+ s, \d+ tokens/s, 256 passes of the model"
    assert re.fullmatch(rf"{figures}; compiled in [\d.]+ s before", first) and re.fullmatch(figures, second)


def test_a_moved_folder_and_a_lost_tokenizer(stories, test_data, tmp_path, ask, refused):
    moved = shutil.copytree(stories, tmp_path / "moved")
    text = (moved / "checkpoints" / "checkpoint_0" / "metadata" / "metadata").read_text(encoding="utf-8")
    lost = str(stories / "tokenizer.bin")
    assert lost in text
    os.rename(lost, f"{lost}.away")
    try:
        assert re.fullmatch("Once .+\n", ask(moved, "--prompt", "", "--length", "5").out)
        os.rename(moved / "tokenizer.bin", tmp_path / "elsewhere.bin")
        message = refused(moved, "--prompt", "")
        assert "error: There is no vocabulary file" in message and "--gin.VOCABULARY_FILE=FILE" in message
        elsewhere = f"--gin.VOCABULARY_FILE={tmp_path / 'elsewhere.bin'}"
        assert re.fullmatch("Once .+\n", ask(moved, "--prompt", "", "--length", "5", elsewhere).out)
        other = f"--gin.VOCABULARY_FILE={test_data / 't5_sentencepiece' / 't5_vocab.model'}"
        assert "was trained with another vocabulary" in refused(moved, "--prompt", "", other)
    finally:
        os.rename(f"{lost}.away", lost)


@pytest.mark.parametrize("form", quick(["old", "new"], ["new"]))
def test_an_imported_encoder_decoder_reads_eos_behind_its_prompt(form, tmp_path, ask):
    specials = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    tokenizer = open_models.save_tokenizer(tmp_path, open_models.byte_level(), **specials)
    vocabulary = vocabulary_files.vocabulary(tokenizer)
    model = ModelConfig(**SIZE, architecture="encoder_decoder", tie_embeddings=False)
    definition = ModelDefinition(model, token_ids(vocabulary))
    params = tiny.random_params(definition)
    text = output.model_gin("random", model, "VOCABULARY_FILE", pathlib.Path(tokenizer))
    save_old(tmp_path, definition, params, text)
    if form == "new":
        give_record(tmp_path)
    written = ask(tmp_path, "--prompt", "Once upon a time", "--length", "6")
    batch = tiny.pack_apart([[([*vocabulary.encode("Once upon a time"), vocabulary.eos_id], [0] * 6)]], 64, 6)
    decoded = make_decode_step(MeshConfig().make(), definition, AutoregressiveDecoder(), seed=0)(params, batch)
    assert written.out == to_text(vocabulary, decoded.tokens[0].tolist()) + "\n" != "\n"
    assert "imported" in written.err and "6 tokens after any number of a prompt" in written.err


@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        (["autoregressive"], [], {"": "AutoregressiveDecoder", "prefix": False}),
        (["autoregressive"], ["Autoregressive.prefix=True"], {"": "AutoregressiveDecoder", "prefix": True}),
        (["sundae", "adaptation/shifted.gin"], [], {"": "SundaeDecoder"}),
        (["masked"], [], {"": "MaskedDecoder"}),
        (["block"], ["BLOCK_SIZE=8"], {"": "BlockDecoder", "block_size": 8, "inner": "MaskedDecoder"}),
        (["block_uniform"], [], {"": "BlockDecoder", "block_size": 4, "inner": "SundaeDecoder"}),
        (["masked", "adaptation/joint.gin"], [], {"": "MaskedDecoder"}),
        (["distillation"], ["BLOCK_SIZE=2"], {"": "BlockDecoder", "block_size": 2, "inner": "MaskedDecoder"}),
        (["sundae", "decoding/sundae.gin"], ["SundaeDecoder.num_steps=3"], {"": "SundaeDecoder", "num_steps": 3}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("form", ["old", "new"])
def test_the_decoder_follows_from_the_training(files, settings, expected, form, tmp_path, monkeypatch):
    """Without one in the training's own configuration, as in pretraining, and with one."""
    run = "runs/finetune.gin" if "decoding/sundae.gin" in files else "runs/pretrain.gin"
    folder = untrained(tmp_path, f"objectives/{files[0]}.gin", *files[1:], run=run, settings=settings, form=form)
    chosen = []

    def stop(agreement, model, decoders):
        agreement_check(agreement, model, decoders)
        chosen.extend(decoders)
        assert model.shifted == ("adaptation/shifted.gin" in files)
        raise KeyError("chosen")

    agreement_check = Agreement.check
    monkeypatch.setattr(Agreement, "check", stop)
    with pytest.raises(KeyError):
        generate.main(["--checkpoint", str(folder), "--prompt", "a"])
    found = {"": type(chosen[0]).__name__} | {f.name: getattr(chosen[0], f.name) for f in dataclasses.fields(chosen[0])}
    found["inner"] = type(found.get("inner")).__name__
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("shifted", [False, True])
def test_an_older_checkpoint_s_objective_says_whether_the_model_is_shifted(shifted, tmp_path, monkeypatch):
    def as_it_was(text):
        old = (f"{name}.shifted = {shifted}" for name in ("masked_objective.Masked", "masked_decoding.MaskedDecoder"))
        assert "model_config.ModelConfig.shifted = False" in text
        return text.replace("model_config.ModelConfig.shifted = False", "\n".join(old))

    folder = untrained(tmp_path, "objectives/masked.gin", "decoding/masked.gin", edit=as_it_was)
    seen = []
    monkeypatch.setattr(Agreement, "check", lambda agreement, model, users: seen.extend([agreement.record, model]))
    monkeypatch.setattr(generate, "prompt_lengths", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate.main(["--checkpoint", str(folder), "--prompt", "a"])
    assert seen[0].shifted is shifted and seen[1].shifted is shifted


@pytest.mark.parametrize(
    ("features", "length", "architecture", "max_length", "expected"),
    [
        ({"inputs": 20, "targets": 12}, None, "decoder_only", None, (20, 12)),
        ({"inputs": 20, "targets": 12}, 30, "encoder_decoder", 30, (20, 30)),
        ({"targets": 32}, None, "decoder_only", None, (16, 16)),
        ({"targets": 32}, 8, "decoder_only", None, (24, 8)),
        (None, None, "decoder_only", 512, (256, 256)),
        (None, 500, "decoder_only", 512, (12, 500)),
        (None, None, "encoder_decoder", 512, (512, 256)),
        (None, None, "decoder_only", None, (None, 256)),
        (None, None, "decoder_only", 40_960, (40_704, 256)),
    ],
)
def test_lengths(features, length, architecture, max_length, expected):
    model = ModelConfig(**SIZE, architecture=architecture, max_length=max_length)
    assert prompt_lengths(features, length, model) == expected
    if max_length == 512 and architecture == "decoder_only":
        with pytest.raises(UserError, match="--length 512 leaves no room for a prompt: the model has 512 tokens"):
            prompt_lengths(features, 512, model)


def test_rows_have_room_for_prompts_of_many_lengths():
    prompts = Prompts(seqio.ByteVocabulary(), False, 200, 10, "decoder_only")
    lengths = [prompts.batch("a" * n, 7).tokens.shape[1] for n in (0, 64, 65, 128, 129, 200)]
    assert lengths == [74, 74, 138, 138, 210, 210] and prompts.batch("a", 7).example_ids.tolist() == [7]
    batch = prompts.batch("abc", 0)
    assert batch.target_mask[0].tolist() == [False] * 3 + [True] * 10 + [False] * 61
    with pytest.raises(UserError, match="it is empty, and the encoder would have nothing to read"):
        dataclasses.replace(prompts, architecture="encoder_decoder").batch("", 0)
    with pytest.raises(UserError, match="PassThroughVocabulary, which has ids and no texts"):
        Prompts(seqio.PassThroughVocabulary(8, 1), False, 8, 8, "decoder_only")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "objective"),
    [
        ("decoder_only", "sundae"),
        ("encoder_decoder", "autoregressive"),
    ],
)
def test_it_writes_what_infer_writes(architecture, objective, tmp_path, ask):
    """With the task's lengths, and what is drawn."""
    files = f"objectives/{objective}.gin", f"decoding/{objective}.gin"
    checkpoint = untrained(tmp_path / "model", *files, architecture=architecture)
    records = [json.dumps({"inputs": prompt, "targets": "-"}) for prompt in PROMPTS]
    (tmp_path / "test.jsonl").write_text("\n".join(records), encoding="utf-8")
    decoder = {
        "sundae": "--gin.SundaeDecoder.num_steps=2",
        "autoregressive": "--gin.AutoregressiveDecoder.temperature=1.0",
    }
    flags = [
        *(f"--gin_file={file}" for file in (f"models/{architecture}.gin", "sizes/tiny.gin", files[1])),
        *("--gin_file=runs/infer.gin", "--gin_file=tasks/local_jsonl.gin", "--gin.VOCABULARY_FILE=None"),
        *(f"--gin.ModelConfig.{name}={value}" for name, value in SIZE.items()),
        *(f"--gin.CHECKPOINT_PATH={checkpoint}", f"--gin.INFER_OUTPUT_DIR={tmp_path}", "--gin.BATCH_SIZE=1"),
        *(f'--gin.FILES={{"test": "{tmp_path}/test.jsonl"}}', f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}"),
        *("--gin.RANDOM_SEED=5", decoder[objective]),
    ]
    config.run(infer.infer, flags)
    lines = (tmp_path / "local-test.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [one_line(json.loads(line)["prediction"]) for line in lines]
    assert len(set(expected)) == 3
    assert ask(checkpoint, "--seed", "5", decoder[objective], lines=PROMPTS).out.split("\n") == [*expected, ""]


@pytest.mark.slow
def test_samples_other_decoders_and_a_text_as_it_is(masked, ask):
    steps = ["--gin_file=decoding/masked.gin", "--gin.MaskedDecoder.num_steps=3", "--gin.MaskedDecoder.temperature=1.0"]
    samples = ask(masked, "--prompt", "a", "--samples", "3", "--length", "8", *steps)
    assert "3 × 8 tokens" in samples.err and samples.err.count("3 passes of the model") == 3
    first, second, third = samples.out.removesuffix("\n").split("\n")
    assert first != second != third
    alone = ask(masked, "--prompt", "a", "--length", "8", *steps).out
    assert one_line(alone.removesuffix("\n")) == first
    assert one_line("a\\n\nb\r") == "a\\\\n\\nb\\r"


def test_mistakes(masked, tmp_path, refused):
    def says(*arguments, **lines):
        message = refused(*arguments, **lines)
        assert "Traceback" not in message
        return message

    assert "does not exist" in says(tmp_path / "nowhere", "--prompt", "a")
    long = says(masked, "--prompt", "x" * 20)
    assert (
        "refused: it has 21 tokens (the EOS behind it is one of them), and the model takes 20. Nothing is truncated"
        in long
    )
    assert "error: Line 1: The prompt is refused" in says(masked, lines=["x" * 40])
    assert "--length must be at least 1, not 0" in says(masked, "--prompt", "a", "--length", "0")
    assert "rows of 5020 tokens" in says(masked, "--prompt", "a", "--length", "5000")
    assert "Did you mean '--gin_file'" in says(masked, "--prompt", "a", "--gin_fil", "b")
    assert "The prompt is refused: it is not UTF-8." in says(masked, "--prompt", "caf\udce9")
    assert "must have targets" in says(masked, "--prompt", "a", "--gin.TASK_FEATURE_LENGTHS={'inputs': 8}")
    shifted = ["--gin_file=adaptation/shifted.gin"]
    assert "is trained with ModelConfig.shifted = False; here it is True" in says(masked, "--prompt", "a", *shifted)
    broken = shutil.copytree(masked, tmp_path / "broken")
    (broken / "checkpoints" / "checkpoint_0" / "metadata" / "metadata").write_text("{")
    assert "is broken: metadata/metadata" in says(broken, "--prompt", "a")
    for name in ("manifest.json", "_CHECKPOINT_METADATA"):
        (broken / "checkpoints" / "checkpoint_0" / name).unlink()
    assert "its metadata, which describe the model, are missing or broken" in says(broken, "--prompt", "a")


def test_no_checkpoint_and_help(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--prompt", "a"])
    assert "Give --checkpoint DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert "--prompt TEXT" in capsys.readouterr().out


def test_a_module_that_is_not_trusted(tmp_path, refused):
    definition = ModelDefinition(ModelConfig(**SIZE), token_ids(seqio.ByteVocabulary(extra_ids=100)))
    text = "from __gin__ import dynamic_registration\nimport subprocess\ntrain.train.train_steps = 1\n"
    save_old(tmp_path, definition, tiny.random_params(definition), text)
    message = refused(tmp_path, "--prompt", "a")
    assert "error: the record of" in message and "imports subprocess" in message and "--gin_allow" in message


def test_what_a_checkpoint_says_makes_settings_and_nothing_else(masked, tmp_path, refused, ask):
    """Its configuration is read unasked: it must not call what writes files."""
    definition = ModelDefinition(ModelConfig(**SIZE), token_ids(seqio.ByteVocabulary(extra_ids=100)))
    victim = tmp_path / "victim"
    text = f"""
from __gin__ import dynamic_registration
from diffusion_t5x import train
from diffusion_t5x.evaluation import inference

train.train.train_steps = 1
inference.write_jsonl.path = {str(victim)!r}
inference.write_jsonl.records = ["mine"]
MIXTURE_OR_TASK_NAME = @inference.write_jsonl()
"""
    save_old(tmp_path / "crafted", definition, tiny.random_params(definition), text)
    message = refused(tmp_path / "crafted", "--prompt", "a")
    assert "it refers to diffusion_t5x.evaluation.inference.write_jsonl, which does more than" in message
    assert "--gin_allow=diffusion_t5x.evaluation.inference" in message and not victim.exists()
    for objective, said in (
        ({"class": "subprocess.Popen", "args": ["touch", str(victim)]}, "imports subprocess"),
        ({"class": "diffusion_t5x.evaluation.inference.write_jsonl", "path": str(victim)}, "which does more than"),
        ({"class": f"x\ninclude '{victim}'\ny.Z"}, "instead of a name"),
        ({"class": "optax.sgd", "a = 1\ninclude 'b'\nc": 1}, "instead of a name"),
    ):
        crafted = shutil.copytree(masked, tmp_path / str(len(str(objective))))
        give_record(crafted, objective=objective)
        assert said in refused(crafted, "--prompt", "a") and not victim.exists()
    # A prompt is no gin, whatever it looks like.
    assert ask(masked, "--prompt", "a@train.com").out


@pytest.mark.slow
def test_what_a_training_leaves_is_enough(tmp_path, ask):
    (tmp_path / "train.jsonl").write_text('{"inputs": "a", "targets": "b"}\n' * 8)
    files = [
        "models/decoder_only.gin",
        "sizes/tiny.gin",
        "objectives/block.gin",
        "decoding/block.gin",
        "runs/finetune.gin",
    ]
    flags = [
        *(f"--gin_file={file}" for file in [*files, "tasks/local_jsonl.gin", "adaptation/shifted.gin"]),
        *(f"--gin.ModelConfig.{name}={value}" for name, value in SIZE.items()),
        *(*RUN, f"--gin.MODEL_DIR={tmp_path}", f'--gin.FILES={{"train": "{tmp_path}/train.jsonl"}}'),
        *("--gin.BLOCK_SIZE=3", f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}", "--gin.BATCH_SIZE=8"),
        *("--gin.train.train.loss_evals=()", "--gin.train.train.decode_evals=()"),
    ]
    config.run(train.train, flags)
    written = ask(tmp_path, lines=["a"])
    assert f"{tmp_path}, step 1, Block: " in written.err and written.out.count("\n") == 1
    assert re.search(r"BlockDecoder\(block_size=3, .*\), 12 tokens", written.err)


def test_the_commands_of_the_page(stories, ask, monkeypatch):
    """Run with an imported model in place of theirs."""
    commands = re.findall(r"diffusion_t5x\.generate ([^\n|>]+)", by_module(PAGE.read_text(encoding="utf-8")))
    assert len(commands) >= 3
    for command in commands:
        flags = shlex.split(command)
        place = flags.index("--checkpoint")
        generate.main([*flags[:place], "--checkpoint", str(stories), *flags[place + 2 :], "--print_config"])
