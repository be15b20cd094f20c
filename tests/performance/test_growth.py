"""Growth: exponents of power laws are found again, and what is measured is what training and decoding do."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from diffusion_t5x import benchmark, report
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.performance import growth, growth_benchmark, stopwatch
from diffusion_t5x.performance.growth import Growth
from diffusion_t5x.performance.model_flops import forward_flops
from diffusion_t5x.performance.stopwatch import OutOfMemory
from diffusion_t5x.training import optimizers

SMALL = dataclasses.replace(tiny.RELATIVE, num_layers=1, vocab_size=None, max_length=16)
SIZES = (128, 256, 512)
LINE = Growth(
    name="AR",
    kind="decoding",
    axis="length",
    sizes=SIZES,
    seconds=tuple((1e-6 * n**1.5, 2e-6 * n**1.5) for n in SIZES),
    peak_bytes=tuple(n**2 for n in SIZES),
    flops=tuple(1000 * n for n in SIZES),
)


def grow(folder, **settings):
    base = {
        "model": SMALL,
        "objectives": {"AR": Autoregressive()},
        "decoders": {"canvas": MaskedDecoder(num_steps=2)},
        "optimizer": optimizers.adafactor(1e-3),
        "benchmark_output_dir": str(folder),
        "axes": {"length": (4, 8), "num_layers": (1, 2)},
        **{"length": 4, "batch_size": 2, "vocabulary_size": 12, "input_length": 1, "repeats": 2},
    }
    benchmark.growth(**{**base, **settings})


def test_power_laws_are_found_again():
    assert LINE.time_exponents == pytest.approx([1.5, 1.5])
    assert growth.cells(LINE)[3:] == ["1.50 ± 0.00", "1.50", "1.00", "1.00", "2.00", "2.00"]
    assert growth.cells(dataclasses.replace(LINE, flops=None))[5:7] == ["–", "–"]
    bent = dataclasses.replace(LINE, seconds=((1.0, 1.0), (1.0, 2.0), (4.0, 4.0)))
    assert bent.time_exponents == pytest.approx([1.0, 1.0]) and bent.at_the_end(bent.medians) == pytest.approx(
        1.415, abs=1e-3
    )
    uneven = dataclasses.replace(LINE, seconds=tuple((float(n), float(n) ** 1.1) for n in SIZES))
    assert growth.exponent_text(uneven) == "1.05 ± 0.64"  # 12.706 * 0.0707 / sqrt(2)
    alone = Growth("AR", "decoding", "length", (4,), ((1.0,),), (5,), None)
    assert growth.cells(alone)[3:] == ["–"] * 6


def test_a_file_is_read_as_it_was_written_and_shown(tmp_path):
    written = json.dumps({"settings": {}, "machine": {}, "growth": [LINE.record()]})
    assert growth.read(json.loads(written)) == [LINE]
    (tmp_path / growth.FILE).write_text(written)
    report.main([str(tmp_path), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "growth of AR with length" in page and "1.50 ± 0.00" in page
    assert page.count("time over length") == 1 and page.count("memory over length") == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"axes": {"width": (1, 2)}}, "'width'.* length, batch_size"),
        ({"axes": {"length": (8, 4)}}, "ascending"),
        ({"axes": {"length": 8}}, "two whole numbers or more"),
        ({"axes": {"length": (4, 5.5)}}, "two whole numbers or more"),
        ({"axes": {}}, "AXES"),
        ({"axes": {"length": (4, 8), "vocabulary_size": (1, 2)}}, "vocabulary_size must be at least 2"),
        ({"axes": {"length": (4, 64)}}, "max_length is 16"),
        ({"objectives": {}, "decoders": {}}, "OBJECTIVES or DECODERS"),
        ({"decoders": {"AR": AutoregressiveDecoder()}}, "one name: AR"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"model": dataclasses.replace(SMALL, architecture="encoder_decoder")}, "decoder-only"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        grow(tmp_path, **settings)


def test_sizes_beyond_memory_are_left_out(tmp_path, monkeypatch):
    class Watch:
        peak_bytes = 5
        seconds = staticmethod(lambda: 1.0)

    def training(place, mesh, name):
        if place.length > 8:
            raise OutOfMemory
        return Watch(), place.length

    monkeypatch.setattr(growth_benchmark._Place, "training", training)
    grow(tmp_path, decoders={}, axes={"length": (4, 8, 12)})
    (line,) = growth.read(json.loads((tmp_path / growth.FILE).read_text()))
    assert line.sizes == (4, 8) and line.flops == (4, 8)
    with pytest.raises(UserError, match="AR does not fit into memory with length = 12"):
        grow(tmp_path, decoders={}, axes={"length": (12, 14)})


def test_slots_of_a_pass():
    assert growth_benchmark.slots_per_pass(AutoregressiveDecoder(), 100) == 1
    assert growth_benchmark.slots_per_pass(BlockDecoder(8, MaskedDecoder(num_steps=2)), 100) == 8
    assert growth_benchmark.slots_per_pass(SundaeDecoder(num_steps=2), 100) == 100
    assert growth_benchmark.slots_per_pass(SelfSpeculationDecoder(), 100) is None


@pytest.mark.slow
def test_training_and_decoding_are_measured(tmp_path, monkeypatch, capsys):
    ones = lambda self, key: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), self.abstract())  # noqa: E731
    monkeypatch.setattr(ModelDefinition, "init", ones)  # the model's own takes seconds to compile
    grow(tmp_path)
    lines = growth.read(json.loads((tmp_path / growth.FILE).read_text()))
    assert [(line.name, line.axis, line.sizes) for line in lines] == [
        (name, axis, sizes) for axis, sizes in (("length", (4, 8)), ("num_layers", (1, 2))) for name in ("AR", "canvas")
    ]
    config = ModelDefinition(SMALL, stopwatch.endless_vocabulary(12)).config
    decoded = lines[1]
    assert decoded.flops == tuple(2 * 2 * forward_flops(config, 1 + n) for n in (4, 8))
    assert all(len(turns) == 2 and min(turns) > 0 for line in lines for turns in line.seconds)
    assert all(line.peak_bytes[0] < line.peak_bytes[1] for line in lines)
    assert "growth with num_layers" in capsys.readouterr().out
