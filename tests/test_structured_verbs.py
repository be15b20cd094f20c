"""Structured output by the verbs and the Python interface: `generate`, `infer`, `Model.generate` and `Model.fill`."""

import io
import json
import re
import sys

import chats
import gin
import open_models
import pytest

import diffusion_t5x as dt
from diffusion_t5x import generate, infer
from diffusion_t5x.command_line import config
from diffusion_t5x.convert import convert
from diffusion_t5x.errors import UserError
from diffusion_t5x.eval import evaluate

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("outlines_core")
pytest.importorskip("seqio")
from untrained import LENGTHS, SIZE, give_record, untrained  # noqa: E402

PROMPTS = ["one", "two", "été"]
CODE = "[0-9]{3}-[a-z]+"
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 2}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structured") / "masked"
    untrained(folder, "objectives/masked.gin", "decoding/masked.gin", form="new")
    give_record(folder, vocabulary_source={"file": None, "extra_ids": 100}, inputs_end=True)
    return folder


@pytest.fixture(scope="module")
def model(masked):
    return dt.load(masked)


@pytest.fixture
def schema(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return str(tmp_path / "schema.json")


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs `generate` with lines on standard input; returns the lines of its answers."""

    def ask(checkpoint, *flags, lines=PROMPTS):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        generate.main(["--checkpoint", str(checkpoint), *flags])
        return capsys.readouterr().out.splitlines()

    return ask


def test_generate_and_the_model_write_the_same_texts_of_an_expression(masked, model, ask):
    answers = ask(masked, "--regex", CODE, "--seed", "3")
    assert len(set(answers)) > 1 and all(re.fullmatch(CODE, answer) for answer in answers)
    assert model.generate(PROMPTS, regex=CODE, seed=3) == answers
    assert not any(re.fullmatch(CODE, answer) for answer in model.generate(PROMPTS, seed=3))


def test_generate_and_the_model_write_the_same_json(masked, model, ask, schema):
    answers = ask(masked, "--json_schema", schema)
    for answer in answers:
        jsonschema.validate(json.loads(answer), SCHEMA)
    assert model.generate(PROMPTS, json_schema=SCHEMA) == model.generate(PROMPTS, json_schema=schema) == answers


def test_a_turn_of_a_chat_is_a_whole_text(tmp_path, ask):
    """EOS is not what ends a turn here."""
    chats.save(tmp_path / "model", "turns")
    open_models.write_qwen2(tmp_path / "model")
    imported, form = str(tmp_path / "imported"), "(th|a){2,4}"
    convert(["from_hf", str(tmp_path / "model"), "--output", imported])
    answers = ask(imported, "--length", "12", "--regex", form, lines=["a", "the a"])
    assert len(answers) == 2 and all(re.fullmatch(form, answer) for answer in answers)
    file = chats.write_lines(tmp_path / "a.jsonl", [[chats.message("user", text)] for text in ("a", "the a")])
    lengths = '--gin.TASK_FEATURE_LENGTHS={"inputs": 96, "targets": 12}'
    flags = [lengths, f"--gin.REGEX={form!r}", f"--gin.INFER_OUTPUT_DIR={tmp_path}"]
    infer.main(["--checkpoint", imported, "--messages", file, *flags])
    lines = (tmp_path / "a-answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == answers


def test_holes_hold_texts_of_the_expression(model):
    texts = ["a<hole:3>c", "<hole:2>-<hole:4>"]
    for text, filled in zip(texts, model.fill(texts, regex="[xyz]+"), strict=True):
        assert re.fullmatch(re.sub(r"<hole:(\d)>", r"[xyz]{\1}", text), filled)


@pytest.fixture
def run_infer(masked, tmp_path):
    """Runs `infer`, or `eval`, on the prompts, in batches of two; returns its predictions."""

    def run(*flags, name="local-test", verb=infer.infer):
        lines = [{"inputs": prompt, "targets": ""} for prompt in PROMPTS]
        holes = [{"inputs": prompt, "template": "a<hole:3>c"} for prompt in PROMPTS]
        for file, records in (("test", lines), ("holes", holes)):
            (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        which = "infer" if verb is infer.infer else "eval"
        files = ("models/decoder_only.gin", "sizes/tiny.gin", "objectives/masked.gin", "decoding/masked.gin")
        config.run(
            verb,
            [
                *(f"--gin_file={file}" for file in (*files, f"runs/{which}.gin", "tasks/local_jsonl.gin")),
                *(f"--gin.ModelConfig.{name}={value}" for name, value in SIZE.items()),
                *(
                    f"--gin.CHECKPOINT_PATH={masked}",
                    f"--gin.{which.upper()}_OUTPUT_DIR={tmp_path}",
                    "--gin.BATCH_SIZE=2",
                ),
                *(f'--gin.FILES={{"test": "{tmp_path}/test.jsonl"}}', f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}"),
                *("--gin.RANDOM_SEED=3", "--gin.VOCABULARY_FILE=None", *flags),
            ],
        )
        gin.clear_config()
        return [json.loads(line)["prediction"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    return run


def test_infer_predicts_what_generate_writes(model, run_infer, capsys):
    """In slots, for there are two batches; other settings do not go on with its file."""
    assert run_infer(f"--gin.REGEX={CODE!r}") == model.generate(PROMPTS, regex=CODE, seed=3)
    with pytest.raises(SystemExit):
        run_infer("--gin.REGEX='[0-9]+'")
    assert "language" in capsys.readouterr().err


def test_eval_scores_what_generate_writes(model, run_infer, tmp_path, capsys):
    found = run_infer(f"--gin.REGEX={CODE!r}", name="local_predictions", verb=evaluate)
    assert found == model.generate(PROMPTS, regex=CODE, seed=3)
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["form"] == f"Language({CODE!r})"
    with pytest.raises(SystemExit):
        run_infer("--gin.JSON_SCHEMA='nowhere.json'", name="local_predictions", verb=evaluate)
    assert "nowhere.json" in capsys.readouterr().err


def test_infer_predicts_json(run_infer, schema):
    for prediction in run_infer(f"--gin.JSON_SCHEMA={schema!r}"):
        jsonschema.validate(json.loads(prediction), SCHEMA)


def test_infer_fills_holes_as_the_model_does(model, run_infer, tmp_path):
    filled = run_infer(
        f"--gin.infer.infer.templates='{tmp_path}/holes.jsonl'", "--gin.REGEX='[xyz]+'", name="infill-holes"
    )
    assert all(re.fullmatch("a[xyz]{3}c", text) for text in filled)
    assert filled == model.fill(["a<hole:3>c"] * 3, PROMPTS, regex="[xyz]+", seed=3)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--regex", "("], r"The regular expression '\(' is refused"),
        (["--regex", "a", "--json_schema", "FILE"], "not both"),
        (["--regex", "a{20}"], "fits 12 tokens: the shortest takes 20. Give it more tokens: --length"),
        (["--regex", "a", "--stop", "b"], "--stop would cut the text"),
        (["--regex", "a", "--gin.MaskedDecoder.top_k=3"], "MaskedDecoder needs .* top_k = None"),
    ],
)
def test_what_generate_refuses(flags, reason, masked, schema, ask, capsys):
    with pytest.raises(SystemExit) as ended:
        ask(masked, *(schema if flag == "FILE" else flag for flag in flags))
    assert ended.value.code == 2 and re.search(reason, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--gin.STOP=('b',)"], "STOP would cut the text"),
        (["--gin.infer.infer.mode='score'", "--gin.infer.infer.objective=%OBJECTIVE"], "leave out .* REGEX"),
        (["--gin.REGEX='a{20}'"], "fits 12 tokens: the shortest takes 20. .*TASK_FEATURE_LENGTHS"),
        (["--gin.REGEX='aaaa'", "--gin.infer.infer.templates='HOLES'"], "fits 3 tokens.*hole larger"),
    ],
)
def test_what_infer_refuses(flags, reason, run_infer, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_infer("--gin.REGEX='a'", *(flag.replace("HOLES", f"{tmp_path}/holes.jsonl") for flag in flags))
    assert ended.value.code == 2 and re.search(reason, capsys.readouterr().err)


def test_what_the_model_refuses(model):
    with pytest.raises(UserError, match="fits 4 tokens: the shortest takes 5"):
        model.generate("a", regex="[a-c]{5}", length=4)
    with pytest.raises(UserError, match="is exactly 3 tokens long"):
        model.fill("a<hole:3>", regex="(ab)*")
