"""Metric writers: what they write, and that a resumed run shows each step once."""

import json
import struct

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
    writer = metrics.JsonlWriter(tmp_path / "train")
    writer.write(1, {"loss": jnp.float32(2.5), "tokens": 3})
    writer.write_text(2, "example", "élan\nvital")
    assert lines(tmp_path / "train") == [{"step": 1, "loss": 2.5, "tokens": 3}, {"step": 2, "example": "élan\nvital"}]
    writer.close()


def test_a_resumed_jsonl_shows_each_step_once(tmp_path):
    writer = metrics.JsonlWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # cut short by a kill
    writer = metrics.JsonlWriter(tmp_path, last_step=3)
    for step in range(4, 7):
        writer.write(step, {"loss": -step})
    writer.close()
    assert {line["step"]: line["loss"] for line in lines(tmp_path)} == {1: 1, 2: 2, 3: 3, 4: -4, 5: -5, 6: -6}
    assert len(lines(tmp_path)) == 6
    metrics.JsonlWriter(tmp_path).close()
    assert lines(tmp_path) == []


def test_tensorboard_values_and_purge(tmp_path):
    writer = metrics.TensorBoardWriter(tmp_path, last_step=3)
    writer.write(4, {"loss": jnp.float32(2.5)})
    writer.write_text(4, "example", "text")
    writer.close()
    found = list(events(tmp_path))
    starts = [event.step for event in found if event.session_log.status == event_pb2.SessionLog.START]
    assert starts == [4]
    values = {value.tag: (event.step, value) for event in found for value in event.summary.value}
    step, value = values["loss"]
    assert (step, value.simple_value) == (4, 2.5)
    step, value = values["example/text_summary"]
    assert (step, value.tensor.string_val) == (4, [b"text"])


def test_make_writer_writes_all(tmp_path):
    writer = metrics.make_writer(tmp_path)
    writer.write(1, {"loss": 0.5})
    writer.write_text(1, "note", "hello")
    writer.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 1, "note": "hello"}]
    assert len(list(events(tmp_path))) >= 3


def test_an_unknown_writer(tmp_path):
    with pytest.raises(UserError, match="'wandb'; there are jsonl, tensorboard"):
        metrics.make_writer(tmp_path, names=["jsonl", "wandb"])
