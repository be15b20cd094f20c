"""The verb as users run it: a table, reasons, JSON, the exit status, and every mistake."""

import json
import re

import pytest
from faulty_decoders import Neighbours

from diffusion_t5x import certify
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.data.vocabularies import cells, signs
from diffusion_t5x.models.config import ModelConfig

seqio = pytest.importorskip("seqio")
from untrained import give_record, untrained  # noqa: E402


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = untrained(tmp_path_factory.mktemp("certify"), "objectives/masked.gin", "decoding/masked.gin", form="new")
    give_record(folder, vocabulary_source={"file": None, "extra_ids": 100}, inputs_end=False)
    return folder


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
