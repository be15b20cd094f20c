"""Decode times: the whole length is written, nothing measured is lost, and where decoders cross."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x import benchmark
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import stopwatch
from diffusion_t5x.performance.decode_times import DecodeTime, compare, crossings
from diffusion_t5x.performance.stopwatch import OutOfMemory, Stopwatch, saturating_batch

SMALL = dataclasses.replace(tiny.RELATIVE, num_layers=1, vocab_size=None, max_length=16)
DECODERS = {"AR": AutoregressiveDecoder(), "4 steps": SundaeDecoder(num_steps=4, num_samples=1)}
SETTINGS = {"vocabulary_size": 12, "lengths": (3,), "input_length": 4, "batch_size": 2, "repeats": 3}


@pytest.fixture(autouse=True)
def plain_params(monkeypatch):
    """The model's own initialiser takes seconds to compile; the verb runs with it in a process of its own, below."""
    zeros = lambda self, key: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.abstract())  # noqa: E731
    monkeypatch.setattr(ModelDefinition, "init", zeros)


def decode(folder, model=SMALL, decoders=DECODERS, **settings):
    benchmark.decode(model=model, decoders=decoders, benchmark_output_dir=str(folder), **{**SETTINGS, **settings})
    return json.loads((folder / "decode_time.json").read_text())


@pytest.mark.parametrize(
    ("architecture", "forwards"), [("decoder_only", {"AR": 3, "4 steps": 4}), ("encoder_decoder", {"4 steps": 4})]
)
def test_records_of_whole_lengths(architecture, forwards, tmp_path, capsys):
    model = dataclasses.replace(SMALL, architecture=architecture)
    report = decode(tmp_path / "out", model, {label: DECODERS[label] for label in forwards})
    assert {time["label"]: time["forwards"] for time in report["times"]} == forwards
    for time in report["times"]:
        assert len(time["seconds"]) == 3 and min(time["seconds"]) > 0 and max(time["seconds"]) < 5
        assert time["seconds_median"] == sorted(time["seconds"])[1]
        assert time["tokens_per_second"] == pytest.approx(2 * time["length"] / time["seconds_median"])
        assert time["ms_per_forward"] == pytest.approx(1000 * time["seconds_median"] / time["forwards"])
        assert time["tokens_per_forward"] == time["length"] / time["forwards"]
        assert time["settings"] == str(DECODERS[time["label"]])
    assert report["settings"]["model"]["architecture"] == architecture and report["machine"]["jax"]
    assert "2 at once" in capsys.readouterr().out
    page = (tmp_path / "out" / "decode_time.html").read_text()
    assert page.count("<svg") == 1 and ("4 steps takes" in page) == ("AR" in forwards)
    svg = (tmp_path / "out" / "decode_time.svg").read_text()
    assert svg.startswith("<?xml") and "--series-0: #" in svg


def test_the_batch_is_doubled_while_that_helps():
    def search(times, start=1, most=64):
        tried = []
        found = saturating_batch(lambda size: tried.append(size) or times[size], start, most)
        return found, tried

    assert search({1: 1.0, 2: 1.0, 4: 1.8, 8: 3.5, 16: 7.0}) == (4, [1, 2, 4, 8])
    assert search({1: 1.0, 2: 1.0, 4: None}) == (2, [1, 2, 4])  # memory
    assert search({1: 1.0, 2: 1.0, 4: 1.0}, most=7) == (4, [1, 2, 4])
    assert search({3: 1.0, 6: 1.99}, start=3, most=6) == (3, [3, 6])


class Clock:
    """Notes which decoder runs next, and is interrupted before the n-th run."""

    def __init__(self, monkeypatch, stop_before=None, seconds=lambda size, run: float(run)):
        self.runs, self.compiled = [], []
        monkeypatch.setattr(benchmark, "Stopwatch", self.watch)
        self.stop_before, self.seconds = stop_before, seconds

    def watch(self, mesh, definition, params, decoder, batch, seed):
        size = len(batch.tokens)
        self.compiled.append((type(decoder).__name__[0], batch.target_mask.sum() // size, size))
        clock = self

        class Watch:
            forwards = 5

            def seconds(self):
                if len(clock.runs) == clock.stop_before:
                    raise KeyboardInterrupt
                clock.runs.append(type(decoder).__name__[0])
                return clock.seconds(len(batch.tokens), len(clock.runs))

        return Watch()


def test_decoders_take_turns_and_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, stop_before=9)
    with pytest.raises(KeyboardInterrupt):
        decode(tmp_path, lengths=(3, 6))
    assert clock.runs == ["A", "S"] * 4 + ["A"]
    kept = json.loads((tmp_path / "decode_time.json").read_text())["times"]
    assert [len(time["seconds"]) for time in kept] == [3, 3, 2, 1]
    again = Clock(monkeypatch)
    report = decode(tmp_path, lengths=(3, 6))
    assert again.runs == ["S", "A", "S"] and again.compiled == [("A", 6, 2), ("S", 6, 2)]
    assert [time["seconds"] for time in report["times"][:2]] == [time["seconds"] for time in kept[:2]]
    assert report["times"][2]["seconds"][:2] == kept[2]["seconds"]
    nothing_left = Clock(monkeypatch)
    assert decode(tmp_path, lengths=(3, 6)) == report and not nothing_left.compiled
    longer = Clock(monkeypatch)
    decode(tmp_path, lengths=(3, 6, 7), repeats=1)
    assert longer.compiled == [("A", 7, 2), ("S", 7, 2)]


def test_saturating_batches_are_found_measured_and_reported(tmp_path, monkeypatch, capsys):
    """Up to 4 texts take no longer than 2, and 8 take twice as long."""
    clock = Clock(monkeypatch, seconds=lambda size, run: max(1.0, size / 4))
    report = decode(tmp_path, lengths=(3, 6), max_batch_size=16, repeats=1)
    tried = {length: [size for _, n, size, _ in report["search"] if n == length] for length in (6, 3)}
    assert tried == {6: [2, 4, 8] * 2, 3: [4, 8] * 2}  # what saturates the longer is where the shorter starts
    saturating = [time for time in report["times"] if time["saturating"]]
    assert [(time["label"], time["length"], time["batch_size"]) for time in saturating] == [
        (label, length, 4) for length in (3, 6) for label in DECODERS
    ]
    assert len(clock.compiled) == 2 * (2 + 3 + 2)  # what the search has compiled is not compiled again
    assert "saturating batches" in capsys.readouterr().out
    assert (tmp_path / "decode_time_saturating.svg").exists()
    again = Clock(monkeypatch)
    assert decode(tmp_path, lengths=(3, 6), max_batch_size=16, repeats=1) == report and not again.compiled


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"input_length": 5}, r"settings\.input_length"),
        ({"decoders": DECODERS | {"4 steps": SundaeDecoder(num_steps=5, num_samples=1)}}, r"decoders\.4 steps\.num_st"),
        ({"model": dataclasses.replace(SMALL, mlp_dim=8)}, r"settings\.model\.mlp_dim"),
        ({"batch_size": 1}, r"settings\.batch_size"),
    ],
)
def test_measurements_of_something_else_stay(change, name, tmp_path, monkeypatch):
    Clock(monkeypatch)
    report = decode(tmp_path)
    with pytest.raises(UserError, match=name):
        decode(tmp_path, **change)
    monkeypatch.setattr(stopwatch, "describe_machine", lambda: report["machine"] | {"device_kind": "TPU v9"})
    with pytest.raises(UserError, match=r"machine\.device_kind"):
        decode(tmp_path)
    assert json.loads((tmp_path / "decode_time.json").read_text()) == report
    (tmp_path / "decode_time.json").write_text("mine")
    with pytest.raises(UserError, match="different settings"):
        decode(tmp_path)
    assert (tmp_path / "decode_time.json").read_text() == "mine"


def test_where_memory_runs_out_is_said(tmp_path, monkeypatch):
    def too_large(*args):
        raise OutOfMemory

    monkeypatch.setattr(benchmark, "Stopwatch", too_large)
    with pytest.raises(UserError, match="AR: 2 texts of 3 tokens do not fit"):
        decode(tmp_path)


@dataclasses.dataclass(frozen=True)
class StopsEarly(AutoregressiveDecoder):
    def decode(self, model, batch, key, trace=False):
        decoded = super().decode(model, batch, key, trace)
        return decoded.replace(tokens=decoded.tokens.at[:, -1].set(model.vocabulary.eos_id))


def test_a_decoder_that_stops_early_is_not_measured():
    definition = ModelDefinition(SMALL, stopwatch.endless_vocabulary(12))
    batch = stopwatch.random_batch(definition, 2, input_length=2, length=3, seed=0)
    params = tiny.random_params(definition)
    with pytest.raises(RuntimeError, match="2 of 6 targets"):
        Stopwatch(MeshConfig().make(), definition, params, StopsEarly(), batch, seed=0)


def test_more_than_the_machine_holds_is_not_begun(monkeypatch):
    monkeypatch.setattr(stopwatch.os, "sysconf", lambda name: 1)
    definition = ModelDefinition(SMALL, stopwatch.endless_vocabulary(12))
    batch = stopwatch.random_batch(definition, 2, input_length=2, length=3, seed=0)
    with pytest.raises(OutOfMemory):
        Stopwatch(MeshConfig().make(), definition, tiny.random_params(definition), DECODERS["AR"], batch, seed=0)


def test_rows_are_inputs_and_then_targets():
    definition = ModelDefinition(SMALL, stopwatch.endless_vocabulary(12))
    batch = stopwatch.random_batch(definition, batch_size=5, input_length=4, length=3, seed=0)
    np.testing.assert_array_equal(batch.target_mask, np.tile([False] * 4 + [True] * 3, (5, 1)))
    assert batch.tokens.min() >= 0 and batch.tokens.max() < definition.vocabulary.mask_id
    assert len(np.unique(batch.tokens[:, :4])) > 5


def test_crossings_are_those_of_power_laws():
    """14 ms a token against 10 steps of 0.05 ms a token and 20 ms: 0.014 x = 10 (0.02 + 5e-5 x) at x = 14.8."""
    x = np.geomspace(8, 32, 200)
    ((length, seconds),) = crossings(dict(zip(x, 0.014 * x, strict=True)), dict(zip(x, 0.2 + 5e-4 * x, strict=True)))
    assert length == pytest.approx(0.2 / 0.0135, rel=1e-4) and seconds == pytest.approx(0.014 * length, rel=1e-4)
    # Powers of x are straight in log-log, so two points do: x^2 / 100 = x at 100.
    ((length, seconds),) = crossings({10: 1, 1000: 10_000}, {10: 10, 1000: 1000})
    assert (length, seconds) == (pytest.approx(100), pytest.approx(100))
    assert list(crossings({1: 1, 2: 3, 4: 5}, {1: 1, 2: 3, 4: 6})) == [(1, 1), (2, 3)]  # where they touch
    assert not list(crossings({1: 1, 2: 2, 3: 9}, {1: 2, 2: 3, 4: 1}))  # only what both have


def test_decoders_are_compared_by_the_text_and_with_autoregression():
    def times(label, decoder, batch_size, *seconds):
        fields = {"settings": "", "saturating": True, "forwards": 1, "device": ""}
        return [
            DecodeTime(label, decoder, length=n, batch_size=batch_size, seconds=(s,), **fields)
            for n, s in zip((10, 1000), seconds, strict=True)
        ]

    ar = times("AR", "AutoregressiveDecoder", 1, 1.0, 10_000.0)
    crossing = times("ten", "SundaeDecoder", 4, 40.0, 4000.0)
    slow, fast = times("slow", "MaskedDecoder", 1, 2.0, 1e5), times("fast", "MaskedDecoder", 2, 1.9, 1.0)
    assert dict(compare([*ar, *crossing, *slow, *fast])) == {
        "ten takes as long as AR at 100 tokens.": [(pytest.approx(100), pytest.approx(100))],
        "slow takes more time than AR at every length measured.": [],
        "fast takes less time than AR at every length measured.": [],
    }
    assert not list(compare(crossing))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": ()}, r"decode\.lengths"),
        ({"lengths": (3, 0)}, r"decode\.lengths"),
        ({"repeats": 0}, r"decode\.repeats"),
        ({"lengths": (13,)}, "max_length is 16"),
        ({"batch_size": 0}, r"decode\.batch_size"),
        ({"max_batch_size": 1}, r"decode\.max_batch_size"),
        ({"vocabulary_size": 1}, "vocabulary_size must be at least 2"),
        ({"decoders": {}}, r"decode\.decoders"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        decode(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "but there is none"),
        (["--gin_file=x.gin"], "not '--gin_file=x.gin'"),
        (["decoed"], "Did you mean 'decode'"),
        (["decode", "--gin_fle=x"], "Did you mean '--gin_file'"),
    ],
)
def test_what_is_measured_has_to_be_said(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(words)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and printed.startswith("error: ") and printed.count("\n") == 1


def test_help(capsys):
    benchmark.main(["--help"])
    assert "decode" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        benchmark.main(["decode", "--help"])
    assert "diffusion-t5x benchmark decode --gin_file=FILE" in capsys.readouterr().out


@pytest.mark.slow
def test_the_verb_runs_without_tensorflow(tmp_path):
    program = f"""
import sys
sys.modules.update(dict.fromkeys(["tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "t5"]))
from diffusion_t5x import benchmark
benchmark.main([
    "decode", "--gin_file=recipes/quickstart/benchmark.gin", "--gin.BENCHMARK_OUTPUT_DIR={tmp_path}",
    "--gin.ModelConfig.num_layers=1", "--gin.LENGTHS=(4,)", "--gin.INPUT_LENGTH=4", "--gin.BATCH_SIZE=2",
])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    times = json.loads((tmp_path / "decode_time.json").read_text())["times"]
    assert {time["label"]: time["forwards"] for time in times} == {"AR": 4, "diffusion, 10 steps": 10}
