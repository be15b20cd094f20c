"""Several processes as one run, and the scripts that start them."""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from quickstart_runs import KEEP_THREE, TINY

from diffusion_t5x.command_line import processes
from diffusion_t5x.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


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


def run_script(name, *arguments, **options):
    return subprocess.run(["bash", str(LAUNCH / name), *arguments], capture_output=True, text=True, **options)


SCRIPTS = {
    "local.sh": ["2"],
    "tpu_vm.sh": ["--name", "a_slice", "--zone", "a_zone", "--retries", "0", "--"],
    "xpk.sh": ["--cluster", "c", "--zone", "z", "--tpu-type", "v5p-128", "--workload", "w", "--"],
    "slurm.sh": [],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_print_what_they_would_do(name):
    lengths = '--gin.TASK_FEATURE_LENGTHS={"inputs": 8, "targets": 8}'
    process = run_script(name, "--print", *SCRIPTS[name], "train", lengths)
    assert process.returncode == 0, process.stderr
    last = process.stdout.splitlines()[-1]
    assert "diffusion_t5x.train" in last and "--distributed" in last
    # What a shell makes of the line holds the argument whole, also where it goes through a second shell.
    assert (
        lengths.split("=", 1)[1]
        in subprocess.run(["bash", "-c", f"printf '%s\\n' {last}"], capture_output=True, text=True, check=True).stdout
    )
    assert run_script(name, "--print").returncode == 2


def test_scripts_are_clean():
    folders = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join(folders))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra test)")
    scripts = [*map(str, LAUNCH.glob("*.sh")), str(ROOT / ".ci/run")]
    process = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("code,status", [(0, 0), (3, 3), (75, 75)])
def test_a_process_that_fails_ends_the_others(tmp_path, code, status):
    """With a python that does what the test says: process 1 ends, and where it fails, process 0 would wait for ever."""
    script = (LAUNCH / "local.sh").read_text().split('source "$(dirname')
    assert len(script) == 2
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/bash\n[ "$1" = -c ] && echo 1 && exit\necho "process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $*"\n'
        f'[ "$JAX_PROCESS_ID" = 0 ] && [ {code} = 3 ] && exec sleep 600\nexit {code}\n'
    )
    python.chmod(0o755)
    there = tmp_path / "launch/local.sh"
    there.parent.mkdir()
    there.write_text(f"{script[0]}VENV={tmp_path}/venv\n{script[1].partition(chr(10))[2]}")
    process = subprocess.run(["bash", there, "2", "train", "--a=b"], capture_output=True, text=True, timeout=60)
    assert process.returncode == status
    assert "1: process 1 of 2: -m diffusion_t5x.train --a=b --distributed" in process.stdout.splitlines()


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
