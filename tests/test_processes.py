"""Several processes as one run."""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
from quickstart_runs import KEEP_THREE, TINY

from diffusion_t5x.command_line import processes
from diffusion_t5x.errors import UserError


def flags(*argv):
    parser = argparse.ArgumentParser()
    processes.add_flags(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    "argv,environment,message",
    [
        (["--num_processes=2"], {}, "--num_processes: add --distributed"),
        (
            ["--distributed", "--num_processes=2"],
            {},
            r"needs --coordinator_address .*, --process_id \(JAX_PROCESS_ID\)",
        ),
        (["--distributed"], {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES = 'two' is not a number"),
        (
            ["--distributed", "--process_id=2"],
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"},
            "--process_id 2 must be below --num_processes 2",
        ),
    ],
)
def test_processes_that_are_not_all_named_are_refused(argv, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        processes.join(flags(*argv))


def test_where_nothing_says_which_processes_there_are_it_is_said():
    code = "from diffusion_t5x import train; train.main(['--distributed', '--gin_file=runs/pretrain.gin'])"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COORD", "SLURM", "TPU"))}
    process = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert process.returncode == 2
    assert "nothing here says which processes there are" in process.stderr


def test_pathways_is_connected_to_where_jax_is_told_to_use_its_proxy(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "proxy,cpu")
    monkeypatch.setitem(sys.modules, "pathwaysutils", None)
    with pytest.raises(UserError, match=r"pip install 'diffusion_t5x\[pathways\]'"):
        processes.join(flags())
    connected = []
    library = types.SimpleNamespace(initialize=lambda: connected.append(True))
    monkeypatch.setitem(sys.modules, "pathwaysutils", library)
    processes.join(flags())
    assert connected == [True]
    with pytest.raises(UserError, match="Leave out --distributed"):
        processes.join(flags("--distributed"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    processes.join(flags())
    assert connected == [True]


def together(number, verb, *arguments):
    """A verb in so many processes that share four devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={4 // number}"
    command = [sys.executable, "-m", f"diffusion_t5x.{verb}", *arguments]
    if number > 1:
        command += ["--distributed", f"--coordinator_address={address}", f"--num_processes={number}"]
    running = [
        subprocess.Popen(
            [*command, *([f"--process_id={index}"] if number > 1 else [])],
            env={**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(number)
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * number, "\n".join(said)


def train(number, model_dir, steps, *arguments):
    settings = {"MODEL_DIR": model_dir, "TRAIN_STEPS": steps, "EVAL_PERIOD": 2, "WARMUP_STEPS": 0}
    settings |= {"loop.Periods.log": 1, "loop.Periods.save": 2}
    given = [f"--gin.{name}={value}" for name, value in settings.items()]
    together(number, "train", "--gin_file=recipes/quickstart/pretrain_ar.gin", *given, *TINY, *arguments)


def curve(model_dir, folder, *names):
    lines = (model_dir / folder / "metrics.jsonl").read_text().splitlines()
    return [[line[name] for name in names] for line in map(json.loads, lines)]


@pytest.mark.slow
def test_a_run_goes_on_in_other_processes_as_if_nothing_had_changed(tmp_path):
    (tmp_path / "keep.gin").write_text(KEEP_THREE)
    settings = {4: [], 2: ["--gin.MeshConfig.fsdp=4"], 1: ["--gin.MeshConfig.fsdp=2"]}
    losses, evaluated, written = {}, {}, {}
    for number, mesh in settings.items():
        folder = tmp_path / f"in_{number}"
        if number < 4:  # on from the second step of the four
            shutil.copytree(tmp_path / "in_4", folder, ignore=shutil.ignore_patterns("checkpoint_4"))
        train(number, folder, 4, f"--gin_file={tmp_path / 'keep.gin'}", *mesh)
        losses[number] = curve(folder, "train", "step", "loss", "gradient_norm")
        evaluated[number] = curve(folder, "training_eval/quickstart_pretrain", "step", "loss", "accuracy")
        if number < 4:
            output = tmp_path / f"written_by_{number}"
            places = [f"--gin.CHECKPOINT_PATH={tmp_path / 'in_4'}", f"--gin.EVAL_OUTPUT_DIR={output}"]
            few = ["--gin.NUM_DECODED_EXAMPLES=8", "--gin.BATCH_SIZE=8"]
            together(number, "eval", "--gin_file=recipes/quickstart/eval_ar.gin", *places, *few, *TINY, *mesh)
            lines = next(output.glob("*.jsonl")).read_text().splitlines()
            written[number] = [(line["example_id"], line["prediction"]) for line in map(json.loads, lines)]
    for number in (1, 2):
        assert [step for step, *_ in losses[number]] == [1, 2, 3, 4]
        np.testing.assert_allclose(losses[number], losses[4], rtol=1e-5)
        np.testing.assert_allclose(evaluated[number], evaluated[4], rtol=1e-5)
    assert len(written[1]) == 8 and written[1] == written[2]
