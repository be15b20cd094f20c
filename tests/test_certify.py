"""The verb as users run it: a table, reasons, JSON, the exit status, and every mistake."""

import json
import re

import pytest
from faulty_decoders import Neighbours

from diffusion_t5x import certify
from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.data.vocabularies import cells, signs
from diffusion_t5x.evaluation.certificate import Comparison, Differing
from diffusion_t5x.evaluation.margins import Difference, Margin
from diffusion_t5x.models.config import ModelConfig

seqio = pytest.importorskip("seqio")
from untrained import give_record, untrained  # noqa: E402


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = untrained(tmp_path_factory.mktemp("certify"), "objectives/masked.gin", "decoding/masked.gin", form="new")
    give_record(folder, vocabulary_source={"file": None, "extra_ids": 100}, inputs_end=False)
    return folder


def test_what_a_reader_is_told():
    """Every verdict, in the table, in words and in JSON."""
    vocabulary = seqio.ByteVocabulary()
    layout = Prompts(vocabulary, False, 8, 4, "decoder_only")
    rows = [layout.batch(text, number) for number, text in enumerate(["one", "été"])]
    a, b, c = (vocabulary.encode(letter)[0] for letter in "abc")
    flip = Differing(1, (a, b), (a, c), Difference(1, 6, b, 6, c), Margin(2e-6))
    place = Differing(0, (a, b), (c, b), Difference(0, 3, None, 4, c), Margin(64.0, is_exact=False))
    lost = Differing(0, (a,), (b,), None, None)
    comparisons = [
        Comparison("float32", "in a batch of 2", 2, (flip,), 1e-6, 1e-3),
        Comparison("float32", "reversed", 2, (place,), None, 1e-3),
        Comparison("float32", "in slots", 2, (lost,), None, 1e-3),
        Comparison("float32", "on all devices", reason="this machine has one device (cpu)"),
        Comparison("float32", "alone in bfloat16", 2, (flip,), 0.1, None),
    ]
    page = certify.Page(["one", "été"], rows, layout, comparisons)
    flipped = f"in step 1, 'b' ({b}) at 1 became 'c' ({c}) at 1; margin 2e-06 nats"
    assert page.lines() == [
        "Not possible: on all devices: this machine has one device (cpu).",
        f"float32, in a batch of 2: text 2 ('été'): {flipped}",
        f"float32, reversed: text 1 ('one'): in step 0, nothing became 'c' ({c}) at 1; margin more than 64 nats",
        "float32, in slots: text 1 ('one'): where it parts is not known: the decoder may rewrite tokens",
        f"float32, alone in bfloat16: text 2 ('été'): {flipped}",
        "Not certified: 2 of 3 comparisons show a fault: reversed (float32), in slots (float32).",
    ]
    columns = [list(column.cells) for column in page.table().columns]
    assert columns[3] == ["2e-06", "64", "unknown", "", "2e-06"]
    assert columns[-1] == ["rounding", "fault", "fault", "not possible", "expected"]
    record = json.loads(json.dumps(page.record()))
    assert not record["certified"] and record["comparisons"][3]["differing"] == []
    assert record["comparisons"][0]["differing"][0] == {
        "text": 1,
        "reference": "ab",
        "reference_tokens": [a, b],
        "other": "ac",
        "other_tokens": [a, c],
        "step": 1,
        "position": 1,
        "token": {"id": b, "text": "b"},
        "other_position": 1,
        "other_token": {"id": c, "text": "c"},
        "margin": 2e-6,
        "margin_is_exact": True,
    }
    unknown = record["comparisons"][2]["differing"][0]
    assert {name for name, value in unknown.items() if value is None} == {
        *("step", "position", "token", "other_position", "other_token", "margin", "margin_is_exact")
    }
    assert certify.Page(["one", "été"], rows, layout, comparisons[:1]).lines()[-1].startswith("Certified: 1 ")


@pytest.mark.slow
def test_a_certificate(masked, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\n\nété\n", encoding="utf-8")
    flags = ["--checkpoint", str(masked), "--prompts", str(tmp_path / "prompts.txt"), "--prompt", "a", "--length", "4"]
    certify.main([*flags, "--output", str(tmp_path / "out.json"), "--gin.MaskedDecoder.num_steps=2"])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[-1] == "Certified: 6 comparisons without a fault."
    assert "Not possible: on all devices: this machine has one device (cpu)." in lines
    assert "Not possible: without a cache: MaskedDecoder has one way to read: it keeps no cache." in lines
    assert sum(" 0 of 3 " in line and " same" in line for line in lines) >= 6
    assert "3 texts of 4 tokens, seed 0" in printed.err

    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["certified"] is True and found["prompts"] == ["a", "one", "été"]
    assert found["length"] == 4 and found["seed"] == 0 and found["devices"] == ["cpu"]
    assert "num_steps=2" in found["decoder"]
    ways = [(each["dtype"], each["way"]) for each in found["comparisons"]]
    assert len(ways) == len(set(ways)) == 11 and {dtype for dtype, _ in ways} == {"float32", "bfloat16"}
    assert {frozenset(each) for each in found["comparisons"]} == {
        frozenset(["dtype", "way", "verdict", "reason", "num_texts", "gap", "bound", "differing"])
    }
    assert found["comparisons"][0]["bound"] == 1e-3 and found["comparisons"][-1]["bound"] is None


@pytest.mark.slow
def test_a_fault_is_told_and_the_status_is_one(masked, tmp_path, capsys):
    checkpoint = checkpoints.open_checkpoint(str(masked))
    vocabulary = seqio.ByteVocabulary(extra_ids=100)
    with pytest.raises(SystemExit) as ended:
        certify.certify(
            checkpoint_path=str(masked),
            model=ModelConfig(**checkpoint.record.model),
            decoder=Neighbours(num_steps=3),
            vocabulary=vocabulary,
            prompt=["one", "two", "three"],
            length=6,
            output=str(tmp_path / "out.json"),
        )
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"Not certified: \d of 6 comparisons show a fault: in a batch of 3 \(float32\), ", lines[-1])
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["certified"] is False
    first = found["comparisons"][0]
    assert first["verdict"] == "fault" and len(first["differing"]) >= 1
    for text in first["differing"]:
        assert text["margin"] > 1e-3 and text["reference_tokens"] != text["other_tokens"] and 0 <= text["position"] < 6
        token = text["token"] or text["other_token"]
        assert token["text"] == cells(vocabulary, [token["id"]], signs(vocabulary))[0]
    assert sum("; margin " in line and " nats" in line and "became" in line for line in lines) >= len(
        first["differing"]
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompt", "a"], "at least two prompts"),
        (["--prompts", "/nowhere/prompts.txt"], "--prompts /nowhere/prompts.txt cannot be read"),
        (["--prompt", "a", "--prompt", "b", "--length", "0"], "--length must be at least 1, not 0"),
        (["--prompt", "a", "--prompt", "b", "--bound", "-1"], "--bound must be at least 0, not -1.0"),
        (["--prompt", "a", "--prompt", "x" * 40], "The prompt is refused: it has 40 tokens"),
    ],
)
def test_mistakes(flags, expected, masked, capsys):
    with pytest.raises(SystemExit) as ended:
        certify.main(["--checkpoint", str(masked), *flags])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message
