"""Slots are timed beside whole batches on texts as long as those of a file."""

import dataclasses
import gzip
import json

import pytest
import tiny

from diffusion_t5x import benchmark
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.performance.slot_speed import SlotSpeed

SMALL = dataclasses.replace(tiny.RELATIVE, num_layers=1, vocab_size=None)


def slots(folder, **settings):
    lines = [json.dumps({"text": "é" * number, "code": "x" * (9 * number)}) for number in range(1, 9)]
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    settings = {
        "model": SMALL, "decoders": {"AR": AutoregressiveDecoder()}, "vocabulary_size": 12, "num_texts": 4,
        "inputs_field": "text", "targets_field": "code", "bytes_per_token": 4, "input_length": 3, "target_length": 12,
        "batch_size": 2, "repeats": 2, **settings,
    }  # fmt: skip
    benchmark.slots(benchmark_output_dir=str(folder), text_file=str(folder / "texts.jsonl.gz"), **settings)


@pytest.mark.slow
def test_texts_of_a_file_in_both_ways(tmp_path, capsys):
    slots(tmp_path)
    report = json.loads((tmp_path / "slot_speed.json").read_text())
    (found,) = report["decoders"]
    # Bytes over four, rounded to even, at least 1 and cut to what there is room for.
    every = {number: [min(max(round(number / 2), 1), 3), min(round(9 * number / 4), 12)] for number in range(1, 9)}
    assert len(report["lengths"]) == 4 and all(sizes in every.values() for sizes in report["lengths"])
    assert found["tokens"] == sum(targets for _, targets in report["lengths"])
    assert len(found["batches"]) == len(found["slots"]) == 2 and found["num_differing"] == 0
    assert found["gain"] == pytest.approx(sum(found["batches"]) / sum(found["slots"]))
    assert "tokens/s in slots" in capsys.readouterr().out


def test_the_gain_is_of_medians():
    speed = SlotSpeed("AR", 60, (4.0, 6.0, 20.0), (3.0, 2.0, 1.0), 0)
    assert speed.gain == 3 and speed.record()["tokens_per_second_in_batches"] == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_texts": 3}, "num_texts must be a multiple of batch_size = 2, at least twice it; got 3"),
        ({"num_texts": 10}, "has 8 texts; 10 are to be drawn. Set NUM_TEXTS"),
        ({"targets_field": "answer"}, "is no JSON object with the texts 'text' and 'answer'. Set INPUTS_FIELD"),
        ({"repeats": 0}, "benchmark.slots.repeats must be greater than 0, not 0"),
        ({"decoders": {}}, "decoders must not be empty"),
        ({"decoders": {"beams": BeamSearchDecoder()}}, "BeamSearchDecoder cannot decode in slots"),
        ({"model": dataclasses.replace(SMALL, max_length=8, position="learned")}, "benchmark.slots.target_length"),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled(settings, message, tmp_path):
    with pytest.raises(UserError) as raised:
        slots(tmp_path, **settings, dry_run=True)
    assert message in str(raised.value)
    assert not (tmp_path / "slot_speed.json").exists()


def test_a_dry_run_measures_nothing(tmp_path, capsys):
    slots(tmp_path, dry_run=True)
    assert "Would time AR on 4 texts of" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 1
