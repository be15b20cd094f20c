"""A run that an error ends lets go of the terminal soon: it does not wait for threads of the data or of a save."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

pytest.importorskip("seqio")

PAIRS = '{"inputs": "one", "targets": "un"}\n{"inputs": "two", "targets": "deux"}\n'
METRIC = "def broken(targets, predictions):\n    raise ZeroDivisionError('the metric fails')\n"
GIN = "from __gin__ import dynamic_registration\nimport metric_that_fails\nMETRICS = (@metric_that_fails.broken,)\n"
FILES = (
    "models/decoder_only sizes/tiny objectives/sundae decoding/sundae runs/finetune tasks/local_jsonl {folder}/broken"
)
SETTINGS = """VOCABULARY_FILE=None INITIAL_CHECKPOINT_PATH=None BATCH_SIZE=2 TRAIN_STEPS=4 EVAL_PERIOD=2
 FILES={{"train":"{folder}/pairs.jsonl","validation":"{folder}/pairs.jsonl"}}
 TASK_FEATURE_LENGTHS={{"inputs":8,"targets":8}} MODEL_DIR={folder}/run"""


@pytest.mark.slow
def test_a_metric_that_raises_ends_the_run_within_seconds(tmp_path):
    for name, text in (("pairs.jsonl", PAIRS), ("metric_that_fails.py", METRIC), ("broken.gin", GIN)):
        (tmp_path / name).write_text(text)
    files = [f"--gin_file={name}.gin" for name in FILES.format(folder=tmp_path).split()]
    settings = [f"--gin.{setting}" for setting in SETTINGS.format(folder=tmp_path).split()]
    command = [sys.executable, "-m", "diffusion_t5x.train", *files, *settings, "--gin_allow=metric_that_fails"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    earlier = os.times()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stderr is not None
        said = used = ""
        for line in process.stderr:
            said += line
            if "ZeroDivisionError" in line:
                used = pathlib.Path(f"/proc/{process.pid}/stat").read_text()
                raised = time.monotonic()
    assert process.returncode == 1 and "the metric fails" in said
    before = sum(map(int, used.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    now = os.times()
    spent = now.children_user + now.children_system - earlier.children_user - earlier.children_system
    assert spent - before < 4 and time.monotonic() - raised < 60
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_2").is_dir()
