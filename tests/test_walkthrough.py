"""The commands of docs/walkthrough.md, one after another, with fewer steps."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from pages import by_module, write_gin_files

ROOT = pathlib.Path(__file__).parent.parent
FEWER = {"TRAIN_STEPS = 400": "TRAIN_STEPS = 4\nWARMUP_STEPS = 0", "TRAIN_STEPS = 100": "TRAIN_STEPS = 6"}
FEWER |= {"EVAL_PERIOD = 200": "EVAL_PERIOD = 4", "EVAL_PERIOD = 100": "EVAL_PERIOD = 6"}
FEWER |= {"BATCH_SIZE = 32": "BATCH_SIZE = 4", "BATCH_SIZE = 16": "BATCH_SIZE = 4", "EXAMPLES = 16": "EXAMPLES = 4"}
FEWER |= {"walk/distil.gin": "walk/distil.gin --gin.Rollout.num_batches=2", "--length 48": "--length 8"}


@pytest.mark.slow
def test_the_whole_way(test_data, tmp_path):
    page = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    for long, short in FEWER.items():
        assert long in page
        page = page.replace(long, short)
    page = page.replace("/tmp/walk", str(tmp_path))
    write_gin_files(page, tmp_path)
    commands = by_module("".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)))
    getting, commands = commands.split("\n", 1)
    assert "cp tinyshakespeare/input.txt " in getting
    commands = f"zcat {test_data}/tinyshakespeare/input.txt.gz | head -n 2000 > {tmp_path}/plays.txt\n{commands}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", commands], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("qwen3", "exported"))
    assert before != after
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (config["model_type"], config["block_size"]) == ("a2d-qwen3", 4)
    assert "AutoregressiveDecoder(" in done.stderr and "BlockDecoder(" in done.stderr
