"""20 steps are 10, `kill -9` and 10 more, bit for bit, however the data come and whatever is learned."""

import os
import pathlib
import signal
import socket
import subprocess
import time

import pytest
from killing import TINY, check_same, command, environment, write_cache

from diffusion_t5x.training.preemption import RUN_AGAIN

pytestmark = pytest.mark.slow
STEPS = 20
DECODER_ONLY = ("models/decoder_only", "sizes/tiny", "hardware/cpu")
ENCODER_DECODER = ("models/encoder_decoder", "sizes/tiny", "hardware/cpu")
LENGTHS = {"TASK_FEATURE_LENGTHS": '{"inputs": 24, "targets": 24}'}
PACKED = LENGTHS | {"MIXTURE_OR_TASK_NAME": "quickstart_pretrain", "EVAL_STEPS": 2}
PAIRS = PACKED | {"MIXTURE_OR_TASK_NAME": "quickstart_pairs"}
MICROBATCHES = {"train.train.num_microbatches": 2, "DROPOUT_RATE": 0.1, "train.train.ema_decay": 0.9}

CASES = {
    "a packed mixture in microbatches, with dropout and a moving average": (
        (*DECODER_ONLY, "objectives/sundae", "tasks/quickstart", "runs/pretrain"),
        PACKED | MICROBATCHES,
    ),
    "both sides packed": (
        (*ENCODER_DECODER, "objectives/autoregressive", "tasks/quickstart", "runs/pretrain"),
        PACKED | {"MIXTURE_OR_TASK_NAME": "quickstart_pretrain_span_corruption"},
    ),
    "examples one a row, decoded in between": (
        (*DECODER_ONLY, "objectives/masked", "decoding/masked", "tasks/quickstart", "runs/finetune"),
        PAIRS | {"INITIAL_CHECKPOINT_PATH": None, "train.train.restore_rules": "()", "NUM_DECODED_EXAMPLES": 8},
    ),
    "a cached, packed mixture in microbatches": (
        (*DECODER_ONLY, "objectives/block", "runs/pretrain", "data/cached_pretrain"),
        PACKED | MICROBATCHES | {"CACHE_DIR": "CACHE"},
    ),
    "texts that the student writes": (
        (*DECODER_ONLY, "objectives/distillation", "decoding/block", "tasks/quickstart", "runs/distil"),
        PAIRS
        | {"INITIAL_CHECKPOINT_PATH": "TEACHER", "MAX_ROLLOUT_LENGTH": 16, "MIN_ROLLOUT_LENGTH": 8}
        | {
            "Rollout.num_batches": 4,
            "GROWTH_ROLLOUTS": 2,
            "WARMUP_STEPS": 0,
            "BLOCK_SIZE": 4,
            "NUM_DECODED_EXAMPLES": 8,
        },
    ),
    "texts that rewards judge, those of the next rollout written already": (
        (*DECODER_ONLY, "objectives/policy_gradient", "decoding/block", "tasks/overfit", "runs/reinforce"),
        LENGTHS
        | {"MIXTURE_OR_TASK_NAME": "overfit_prefix_lm", "NUM_DECODED_EXAMPLES": 2, "LEARNING_RATE": 1e-3}
        | {"INITIAL_CHECKPOINT_PATH": None, "train.train.restore_rules": "()", "MAX_ROLLOUT_LENGTH": 8}
        | {"REWARD": "@reward_functions.Similarity()", "ROLLOUT_AHEAD": True, "GROUP_SIZE": 2, "BLOCK_SIZE": 4},
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A cache, and an autoregressive model's checkpoint. What one process compiled, the next ones read."""
    folder = tmp_path_factory.mktemp("exact_resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        write_cache(folder / "cache", "quickstart_pretrain")
        files = (*DECODER_ONLY, "objectives/autoregressive", "tasks/quickstart", "runs/pretrain")
        assert start(train(folder / "teacher", files, PACKED | {"TRAIN_STEPS": 2})).wait(600) == 0
        yield {"CACHE": folder / "cache", "TEACHER": folder / "teacher"}


def train(model_dir: pathlib.Path, files, settings) -> list[str]:
    settings = {
        "MODEL_DIR": model_dir,
        "TRAIN_STEPS": STEPS,
        "BATCH_SIZE": 4,
        "EVAL_PERIOD": 10,
        "Periods.log": 1,
    } | settings
    return command("train", files, settings) + [f"--gin.ModelConfig.{size}" for size in TINY]


def start(argv: list[str], **env: str) -> subprocess.Popen:
    return subprocess.Popen(argv, env=environment() | env, stdout=subprocess.DEVNULL)


def kill_after_ten_steps(model_dir: pathlib.Path, running: list[subprocess.Popen]) -> None:
    """SIGKILL as soon as the tenth step's checkpoint has its name; the next one takes longer than we do."""
    deadline = time.monotonic() + 300
    while not (model_dir / "checkpoints/checkpoint_10").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    for process in running:
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in running] == [-signal.SIGKILL] * len(running)
    assert not (model_dir / "checkpoints/checkpoint_20").exists()


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_bit_for_bit(case, places, tmp_path):
    files, settings = CASES[case]
    settings = {name: places.get(value, value) for name, value in settings.items()}
    killed, undisturbed = (train(tmp_path / name, files, settings) for name in ("killed", "undisturbed"))
    assert start(undisturbed).wait(600) == 0
    kill_after_ten_steps(tmp_path / "killed", [start(killed)])
    assert start(killed).wait(600) == 0
    check_same(tmp_path / "killed", tmp_path / "undisturbed", STEPS)


def start_two(argv: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = [*argv, "--distributed", "--num_processes=2", f"--coordinator_address={address}"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    return [start([*joined, f"--process_id={index}"], XLA_FLAGS=flags) for index in range(2)]


def test_two_killed_processes_go_on_bit_for_bit(places, tmp_path):
    files, settings = CASES["a cached, packed mixture in microbatches"]
    settings = {name: places.get(value, value) for name, value in settings.items()} | {"BATCH_SIZE": 8}
    settings |= {"MeshConfig.fsdp": 2}
    killed, undisturbed = (train(tmp_path / name, files, settings) for name in ("killed", "undisturbed"))
    assert [process.wait(600) for process in start_two(undisturbed)] == [0, 0]
    kill_after_ten_steps(tmp_path / "killed", start_two(killed))
    assert [process.wait(600) for process in start_two(killed)] == [0, 0]
    check_same(tmp_path / "killed", tmp_path / "undisturbed", STEPS)


def test_one_of_two_processes_is_told_to_stop_and_both_save_and_go_on(places, tmp_path):
    files, settings = CASES["a cached, packed mixture in microbatches"]
    settings = {name: places.get(value, value) for name, value in settings.items()}
    settings |= {"BATCH_SIZE": 8, "MeshConfig.fsdp": 2, "TRAIN_STEPS": 60, "EVAL_PERIOD": 60}
    told, undisturbed = (train(tmp_path / name, files, settings) for name in ("told", "undisturbed"))
    assert [process.wait(600) for process in start_two(undisturbed)] == [0, 0]
    running, metrics = start_two(told), tmp_path / "told/train/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    assert [process.wait(300) for process in running] == [RUN_AGAIN, RUN_AGAIN]
    (saved,) = (tmp_path / "told/checkpoints").iterdir()
    assert 0 < int(saved.name.removeprefix("checkpoint_")) < 60
    assert [process.wait(600) for process in start_two(told)] == [0, 0]
    check_same(tmp_path / "told", tmp_path / "undisturbed", 60)
