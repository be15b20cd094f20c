"""Weights & Biases without network: what its file holds after a run and its resumption is what metrics.jsonl holds."""

import functools
import json
import socket
import struct
import sys

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from diffusion_t5x import train
from diffusion_t5x.command_line import config
from diffusion_t5x.errors import UserError
from diffusion_t5x.training import metrics
from diffusion_t5x.training.preemption import RUN_AGAIN

FLAGS = [
    "--gin_file=recipes/quickstart/pretrain_ar.gin",
    "--gin.ModelConfig.embed_dim=8",
    "--gin.ModelConfig.num_layers=1",
    "--gin.ModelConfig.mlp_dim=16",
    "--gin.BATCH_SIZE=4",
    "--gin.WARMUP_STEPS=1",
    "--gin.EVAL_STEPS=1",
    "--gin.MIXTURE_OR_TASK_NAME=quickstart_pairs",
    "--gin.TRAIN_STEPS=2",
    "--gin.Periods.log=1",
    '--gin.train.train.metric_writers=("jsonl", "wandb")',
]


@pytest.fixture(scope="module", autouse=True)
def offline():
    """W&B writes to disk; the server that it knows is ours, and nobody calls there."""
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        patch.setenv("WANDB_SILENT", "true")
        yield
        wandb.teardown()
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def records(model_dir):
    """The records of each start of a run, oldest first: a LevelDB log behind a header of 7 bytes."""
    wandb.teardown()  # waits for the process that writes
    for path in sorted(model_dir.glob("wandb/offline-run-*/*.wandb")):
        data, at, record, found = path.read_bytes(), 7, b"", []
        while at < len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            size, kind = struct.unpack_from("<HB", data, at + 4)
            record += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or its last part
                found.append(wandb_internal_pb2.Record.FromString(record))
                record = b""
        yield found


def rows(start):
    """Rows that were logged from one start on, without W&B's own values."""
    for record in start:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            yield {name: value for name, value in items.items() if not name.startswith("_")}


def of_kind(start, kind):
    return [getattr(record, kind) for record in start if record.WhichOneof("record_type") == kind]


@pytest.mark.slow
def test_a_run_and_its_resumption_are_one_run_with_the_metrics_of_the_jsonl(tmp_path):
    config.run(train.train, [*FLAGS, f"--gin.MODEL_DIR={tmp_path}"])
    values = config.operative_values()
    writer = metrics.make_writer(tmp_path, ("jsonl", "wandb"), 2, values | {"TRAIN_STEPS": 3})
    writer.write(3, "train", {"loss": 0.25})
    writer.close()
    first, second = records(tmp_path)

    expected = []
    for path in tmp_path.rglob("metrics.jsonl"):
        folder = path.parent.relative_to(tmp_path).as_posix()
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            step = line.pop("step")
            expected.append({"step": step} | {f"{folder}/{name}": value for name, value in line.items()})
    in_order = functools.partial(sorted, key=lambda row: (row["step"], sorted(row)))
    assert in_order([*rows(first), *rows(second)]) == in_order(expected)
    assert [row["step"] for row in rows(first) if "train/loss" in row] == [1, 2]
    assert [row["step"] for row in rows(first) if "training_eval/quickstart_pairs/loss" in row] == [2]

    for steps, start in ((2, first), (3, second)):
        (run,) = of_kind(start, "run")
        assert run.run_id == (tmp_path / "wandb" / "run_id").read_text(encoding="utf-8")
        assert run.resume and run.project == "diffusion_t5x" and run.display_name == tmp_path.name
        shown = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert shown["TRAIN_STEPS"] == steps
        assert shown["model_config"]["ModelConfig"]["embed_dim"] == 8
        assert shown["train"]["train"]["train_steps"] == "%TRAIN_STEPS"
        (metric,) = of_kind(start, "metric")
        assert (metric.glob_name, metric.step_metric) == ("*", "step")
        assert [end.exit_code for end in of_kind(start, "exit")] == [0]


@pytest.mark.slow
def test_steps_may_go_back_and_a_failure_is_marked(tmp_path):
    writer = metrics.WandbWriter(tmp_path, {})
    with pytest.raises(ZeroDivisionError):
        try:
            writer.write(20, "train", {"loss": 1.5})
            writer.write(10, "training_eval/task", {"loss": 2.5})
            _ = 1 / 0
        finally:
            writer.close()
    (start,) = records(tmp_path)
    assert list(rows(start)) == [{"step": 20, "train/loss": 1.5}, {"step": 10, "training_eval/task/loss": 2.5}]
    assert [end.exit_code for end in of_kind(start, "exit")] == [1]


def test_a_run_that_was_told_to_stop_is_preempted(tmp_path):
    writer = metrics.WandbWriter(tmp_path, {})
    with pytest.raises(SystemExit):
        try:
            sys.exit(RUN_AGAIN)
        finally:
            writer.close()
    (start,) = records(tmp_path)
    assert len(of_kind(start, "preempting")) == 1
    assert [end.exit_code for end in of_kind(start, "exit")] == [RUN_AGAIN]


def test_what_keeps_wandb_from_starting_is_the_users_to_mend(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    with pytest.raises(UserError, match=r"^Weights & Biases: .*set WANDB_MODE=offline"):
        metrics.WandbWriter(tmp_path, {})
