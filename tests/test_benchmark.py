"""Decode times: the whole length is written, with as many steps as the decoder says, and without TensorFlow."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny

from diffusion_t5x import benchmark
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.decoder import Decoded
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition

SMALL = dataclasses.replace(tiny.RELATIVE, num_layers=1, vocab_size=None, max_length=16)
GREEDY = AutoregressiveDecoder()
SETTINGS = {"vocabulary_size": 12, "lengths": (3,), "input_length": 4, "batch_size": 2, "repeats": 3}


def decode_times(folder, model=SMALL, decoder=GREEDY, **settings):
    benchmark.decode(model=model, decoder=decoder, benchmark_output_dir=str(folder), **{**SETTINGS, **settings})
    return json.loads((folder / "decode_time.json").read_text())


@pytest.mark.parametrize(
    ("model", "decoder", "steps"),
    [
        (SMALL, GREEDY, {3: 3, 6: 6}),
        (dataclasses.replace(SMALL, architecture="encoder_decoder"), SundaeDecoder(num_steps=4, num_samples=1), {6: 4}),
    ],
)
def test_records_of_a_whole_length(model, decoder, steps, tmp_path, capsys):
    records = decode_times(tmp_path / "out", model, decoder, lengths=tuple(steps))
    assert {record["length"]: record["steps"] for record in records} == steps
    for record in records:
        assert 0 < record["seconds_min"] <= record["seconds_median"] <= record["seconds_max"] < 5
        assert record["tokens_per_second"] == pytest.approx(2 * record["length"] / record["seconds_median"])
        assert record["settings"] == dataclasses.asdict(decoder)
    assert f"{type(decoder).__name__}, 2 texts at once" in capsys.readouterr().out


def test_a_decoder_that_stops_early_is_not_measured():
    batch = tiny.one_a_row([([3, 4], [5, 6, 7]), ([3, 4], [5, 6, 7])])

    def stops_early(params, batch):
        tokens = np.array(batch.tokens)
        tokens[:, -1] = tiny.VOCABULARY.pad_id
        return Decoded.of(
            tokens,
            batch,
            tiny.VOCABULARY,
            scores=np.zeros(2),
            steps=np.int32(2),
            row_steps=np.full(2, 2),
            written_at=np.where(batch.target_mask, 0, -1),
        )

    with pytest.raises(RuntimeError, match="2 of 6 targets"):
        benchmark.measure(stops_early, {}, batch, end_id=tiny.VOCABULARY.pad_id, repeats=1)


def test_rows_are_inputs_and_then_targets():
    definition = ModelDefinition(SMALL, benchmark.endless_vocabulary(12))
    batch = benchmark.random_batch(definition, batch_size=5, input_length=4, length=3, seed=0)
    np.testing.assert_array_equal(batch.target_mask, np.tile([False] * 4 + [True] * 3, (5, 1)))
    assert batch.tokens.min() >= 0 and batch.tokens.max() < definition.vocabulary.mask_id
    assert len(np.unique(batch.tokens[:, :4])) > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": ()}, r"decode\.lengths"),
        ({"lengths": (3, 0)}, r"decode\.lengths"),
        ({"repeats": 0}, r"decode\.repeats"),
        ({"lengths": (13,)}, "max_length is 16"),
        ({"batch_size": 0}, r"decode\.batch_size"),
        ({"vocabulary_size": 1}, r"decode\.vocabulary_size"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        decode_times(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_earlier_measurement_stays(tmp_path):
    (tmp_path / "decode_time.json").write_text("mine")
    with pytest.raises(UserError, match="there already"):
        decode_times(tmp_path)
    assert (tmp_path / "decode_time.json").read_text() == "mine"


def test_the_verb_runs_without_tensorflow_and_matplotlib(tmp_path):
    program = f"""
import sys
sys.modules.update(dict.fromkeys(["tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "t5", "matplotlib"]))
from diffusion_t5x import benchmark, config
config.run(benchmark.decode, [
    "--gin_file=recipes/quickstart/benchmark_diffusion.gin", "--gin.BENCHMARK_OUTPUT_DIR={tmp_path}",
    "--gin.ModelConfig.num_layers=1", "--gin.LENGTHS=(4,)", "--gin.INPUT_LENGTH=4", "--gin.BATCH_SIZE=2",
])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [record["steps"] for record in json.loads((tmp_path / "decode_time.json").read_text())] == [10]
