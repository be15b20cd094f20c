"""The rehearsal on a CPU of what measures an accelerator, as if TensorFlow and SeqIO were not installed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ABSENT = """import sys
for name in ("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "t5"):
    sys.modules[name] = None
"""


@pytest.mark.slow
def test_smoke_and_speeds_need_neither_tensorflow_nor_seqio(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    (tmp_path / "pack").mkdir()
    command = ["bash", "launch/accelerator.sh", "--rehearse", tmp_path / "pack", tmp_path / "out"]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "smoke", "train", "decode"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    smoke = json.loads((tmp_path / "out" / "smoke.json").read_text())
    assert len(smoke["results"]) == 7
    for result in smoke["results"]:  # the device is the CPU itself
        assert result["float32_relative_difference"] == 0 and result["equal_tokens"] == 1, result
        assert 0 < result["bfloat16_relative_difference"] < 0.03, result
    for folder in ("train_base", "train_large", "train_xl", "train_smollm2", "decode"):
        assert list((tmp_path / "out" / folder).glob("*.json")), folder


def test_an_unknown_part_is_named(tmp_path):
    done = subprocess.run(
        ["bash", "launch/accelerator.sh", "--rehearse", tmp_path, tmp_path / "out", "smok"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "there is no part smok" in done.stderr
