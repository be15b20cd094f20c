"""Metric writers: what they write, and that a resumed run shows each step once."""

import json
import struct
import sys

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from diffusion_t5x.errors import UserError
from diffusion_t5x.training import metrics


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def events(directory):
    """The events of all files in a folder, oldest file first, read by TFRecord's format."""
    for path in sorted(directory.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size


def test_jsonl_lines_are_on_disk_at_once(tmp_path):
    writer = metrics.JsonlWriter(tmp_path)
    writer.write(1, "train", {"loss": jnp.float32(2.5), "tokens": 3})
    writer.write(1, "training_eval/élan", {"loss": 0.5})
    assert lines(tmp_path / "train") == [{"step": 1, "loss": 2.5, "tokens": 3}]
    assert lines(tmp_path / "training_eval" / "élan") == [{"step": 1, "loss": 0.5}]
    writer.close()


def test_a_resumed_jsonl_shows_each_step_once(tmp_path):
    writer = metrics.JsonlWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, "train", {"loss": step})
    writer.close()
    with (tmp_path / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # cut short by a kill
    writer = metrics.JsonlWriter(tmp_path, last_step=3)
    for step in range(4, 7):
        writer.write(step, "train", {"loss": -step})
    writer.close()
    found = lines(tmp_path / "train")
    assert [(line["step"], line["loss"]) for line in found] == [(1, 1), (2, 2), (3, 3), (4, -4), (5, -5), (6, -6)]
    metrics.JsonlWriter(tmp_path).write(1, "train", {"loss": 7})
    assert lines(tmp_path / "train") == [{"step": 1, "loss": 7}]


def test_tensorboard_values_and_purge(tmp_path):
    writer = metrics.TensorBoardWriter(tmp_path, last_step=3)
    writer.write(4, "train", {"loss": jnp.float32(2.5)})
    writer.write(4, "inference_eval/task", {"bleu": 30})
    writer.close()
    for folder, name, expected in (("train", "loss", 2.5), ("inference_eval/task", "bleu", 30)):
        found = list(events(tmp_path / folder))
        starts = [event.step for event in found if event.session_log.status == event_pb2.SessionLog.START]
        assert starts == [4]
        values = [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]
        assert values == [(4, name, expected)]


def test_make_writer_writes_all(tmp_path):
    writer = metrics.make_writer(tmp_path, ("jsonl", "tensorboard"))
    writer.write(1, "train", {"loss": 0.5})
    writer.close()
    assert lines(tmp_path / "train") == [{"step": 1, "loss": 0.5}]
    assert len(list(events(tmp_path / "train"))) >= 3


def test_names_of_writers(monkeypatch):
    metrics.check_writers(metrics.WRITERS)
    with pytest.raises(UserError, match=r"'wandbb'; there are jsonl, tensorboard, wandb\. Did you mean 'wandb'"):
        metrics.check_writers(["jsonl", "wandbb"])
    with pytest.raises(UserError, match=r"such as \('jsonl',\), not 'jsonl'"):
        metrics.check_writers("jsonl")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    sys.path_importer_cache.clear()
    with pytest.raises(UserError, match=r"pip install diffusion_t5x\[wandb\]"):
        metrics.check_writers(["wandb"])
