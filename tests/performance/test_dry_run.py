"""Dry runs for slices: flags, shapes without data, and, where the TPU compiler is installed, real compilations."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x import partitioning
from diffusion_t5x.command_line.slice_flags import slice_dry_run
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import dry_run, topology
from diffusion_t5x.performance.dry_run import SliceDryRun
from diffusion_t5x.performance.hlo_cost import Cost
from diffusion_t5x.performance.roofline import Memory, Report, Roofline
from diffusion_t5x.performance.topology import CHIPS
from diffusion_t5x.training import optimizers
from diffusion_t5x.training.state import abstract_state
from diffusion_t5x.training.step import make_train_step

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: the extra `tpu`"
)


@pytest.mark.parametrize("name", ["v5:4x4", "v5p", "v5p:4", "v5e:4*4", "gpu:8x8"])
def test_slices_are_named_by_chip_and_shape(name):
    with pytest.raises(UserError, match=r"--topology=.*write a chip \(v4, v5e, v5p, v6e\) and the shape"):
        topology.find_slice(name)


def test_the_compiler_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "diffusion_t5x\[tpu\]"'):
        topology.find_slice("v5e:4x4")


def test_flags():
    found, rest = slice_dry_run(["--dry_run", "--topology=v5e:4x4", "--fit", "--gin_file=x.gin"])
    assert found == SliceDryRun("v5e:4x4", None, True) and rest == ["--dry_run", "--gin_file=x.gin"]
    assert slice_dry_run(["--dry_run"]) == (None, ["--dry_run"])
    with pytest.raises(UserError, match="add --dry_run"):
        slice_dry_run(["--topology=v5e:4x4"])
    with pytest.raises(UserError, match="belong to --dry_run --topology"):
        slice_dry_run(["--dry_run", "--fit"])


@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_decoder"])
def test_batches_have_the_shapes_of_those_that_are_read(architecture):
    from diffusion_t5x.tasks import quickstart  # noqa: F401  (registers the task)

    lengths = {"inputs": 24, "targets": 16}
    dataset = SeqioDataset("quickstart_pairs", lengths, batch_size=4, architecture=architecture)
    read, mesh = next(dataset.train_iterator()), MeshConfig().make()
    shapes = dry_run.abstract_batch(mesh, dataset, 4)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), read)
    assert {x.sharding for x in jax.tree.leaves(shapes)} == {partitioning.batch_sharding(mesh)}


def test_the_longest_of_three_is_the_bottleneck():
    chip = CHIPS["v5e"]
    cost = Cost(flops=197e12, hbm_bytes=2 * 819e9)
    cost.sent_bytes["all-gather", 4] = 3 * 200e9
    roofline = Roofline.of(cost, chip)
    assert (roofline.compute, roofline.hbm, roofline.collectives) == (1, 2, 3)
    assert roofline.bottleneck == "collectives" and roofline.seconds == 3
    memory = Memory(arguments=6 << 30, outputs=5 << 30, aliased=5 << 30, temporaries=9 << 30, peak=15 << 30)
    report = Report({"what": "a step"}, chip, memory, "", cost, 1.0, 2.0)
    assert report.fits and "15 GiB of a chip's 16 GiB" in str(report)
    assert not Report({}, CHIPS["v5e"], None, "Used 20G of 15.75G hbm", None, 1.0, 2.0).fits


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [tiny.LLAMA, pytest.param(tiny.ENCODER_DECODER, marks=pytest.mark.slow)],
    ids=["decoder_only", "encoder_decoder"],
)
def test_a_program_does_not_grow_with_depth(config):
    """So neither does the time that it takes to compile."""
    mesh, optimizer = MeshConfig().make(), optimizers.adafactor(1e-2)
    batch = tiny.pack_apart([[tiny.random_example(np.random.default_rng(0), 4, 8)]], 4, 8)

    def lines(depth):
        definition = ModelDefinition(dataclasses.replace(config, num_layers=depth), tiny.VOCABULARY)
        state = abstract_state(mesh, definition, optimizer, keep_ema=False)
        with jax.set_mesh(mesh):
            step = make_train_step(mesh, state, definition, Sundae(), optimizer, seed=0)
            return step.lower(state, batch).as_text().count("\n")

    assert lines(24) == lines(3) > 1000


def run(verb, flags, tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, "-m", f"diffusion_t5x.{verb}", "--dry_run", f"--dry_run_output={output}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text()), done.stdout


MODEL = ["--gin_file=models/decoder_only.gin", "--gin_file=sizes/small.gin", "--gin_file=tasks/quickstart.gin"]
TASK = ["--gin.MIXTURE_OR_TASK_NAME=quickstart_pretrain", '--gin.TASK_FEATURE_LENGTHS={"inputs": 128, "targets": 128}']
TRAIN = ["--gin_file=objectives/autoregressive.gin", "--gin_file=runs/pretrain.gin", "--gin.TRAIN_STEPS=10"]


@needs_compiler
@pytest.mark.slow
def test_a_training_step_compiles_for_a_slice(tmp_path):
    flags = [*MODEL, *TRAIN, *TASK, "--topology=v5e:2x2", "--gin_file=hardware/accelerator.gin"]
    flags += ["--gin.MeshConfig.fsdp=4", "--gin.BATCH_SIZE=8", f"--gin.MODEL_DIR={tmp_path / 'none'}"]
    report, text = run("train", [*flags, "--gin.ModelConfig.position=rotary"], tmp_path)
    assert report["fits"] and "bottleneck: " in text and not (tmp_path / "none").exists()

    # Forward, forward again (remat) and backward, twice as much: of every kernel, and of attention; and the logits,
    # which are not computed again. All on a quarter of the rows.
    from diffusion_t5x.tasks import quickstart  # noqa: F401

    vocabulary = SeqioDataset("quickstart_pretrain", {"inputs": 128, "targets": 128}).token_ids().size
    embed, depth, heads, head_dim, mlp, length, rows = 512, 8, 6, 64, 1024, 256, 2
    kernels = depth * (4 * embed * heads * head_dim + 3 * embed * mlp)
    attention = depth * 2 * length * heads * head_dim
    logits = embed * -(-vocabulary // 128) * 128
    expected = 2 * rows * length * (4 * (kernels + attention) + 3 * logits)
    assert report["flops"] == pytest.approx(expected, rel=0.1)
    # Parameters in float32, on four chips, and what little Adafactor keeps.
    assert report["memory"]["arguments"] == pytest.approx(4 * (kernels + logits) / 4, rel=0.05)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name,kernels,share", [("decoder_only", 4, 0.1), ("t5", 12, 0.7)])
def test_attention_kernels_compile_and_take_less_memory(name, kernels, share):
    def step(backend):
        script = pathlib.Path(__file__).parents[1] / "helpers" / "compile_attention.py"
        done = subprocess.run([sys.executable, script, name, backend], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    plain, found = step("xla"), step("auto")
    assert plain["kernels"] == 0 and found["kernels"] == kernels
    assert found["memory"]["temporaries"] < share * plain["memory"]["temporaries"]
    # Forward twice (remat) two products of queries and keys; backward four, of which kernels compute three once more.
    layers, rows, heads, head_dim, length = 2, 2, 2, 64, 4096
    product = 2 * rows * heads * head_dim * length**2 * layers * (kernels // 4)
    assert found["flops"] - plain["flops"] == pytest.approx(3 * product, rel=0.01)


@needs_compiler
@pytest.mark.slow
def test_a_decoding_loop_compiles_for_a_slice(tmp_path):
    flags = [*MODEL, *TASK, "--gin_file=decoding/block.gin", "--gin_file=runs/infer.gin", "--topology=v5e:2x2"]
    flags += ["--gin_file=hardware/accelerator.gin", "--gin.BATCH_SIZE=8", "--gin.CHECKPOINT_PATH=None"]
    report, text = run("infer", [*flags, f"--gin.INFER_OUTPUT_DIR={tmp_path / 'none'}"], tmp_path)
    assert report["fits"] and report["loops_of_unknown_length"] > 0 and "one iteration" in text


@needs_compiler
@pytest.mark.slow
def test_what_does_not_fit_is_said():
    code = """
import jax, numpy as np
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import dry_run, topology
chip, devices = topology.find_slice("v5e:2x2")
mesh = MeshConfig().make(devices)
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
x = jax.ShapeDtypeStruct((1 << 16, 1 << 16), np.float32, sharding=sharding)
print(dry_run._compile({"what": "a square"}, chip, lambda: jax.jit(lambda x: x @ x).lower(x), mesh))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert "does not fit: " in done.stdout and "HBM" in done.stdout, done.stderr[-2000:]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "report.json").write_text("mine")
    dataset = SeqioDataset("any", {"targets": 8})
    with pytest.raises(UserError, match="exists already, and nothing is overwritten"):
        dry = SliceDryRun("v5e:4x4", str(tmp_path / "report.json"))
        dry._run("a step", None, MeshConfig(), tiny.RELATIVE, dataset, 1)
    assert (tmp_path / "report.json").read_text() == "mine"
