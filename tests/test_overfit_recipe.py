"""Objectives learn eight examples by heart through gin alone, the papers' two with either architecture and task."""

import itertools
import json
import os
import subprocess
import sys

import pytest

PREFIX_LM, SPAN_CORRUPTION = "overfit_prefix_lm", "overfit_span_corruption"
RUNS = [
    *itertools.product(
        ("decoder_only", "encoder_decoder"), (PREFIX_LM, SPAN_CORRUPTION), [("autoregressive", 200), ("sundae", 1200)]
    ),
    ("decoder_only", PREFIX_LM, ("masked", 800)),
    ("decoder_only", SPAN_CORRUPTION, ("block", 800)),
    ("decoder_only", PREFIX_LM, ("block_uniform", 1200)),
]
SLOW = {
    ("decoder_only", PREFIX_LM, ("sundae", 1200)),
    ("encoder_decoder", SPAN_CORRUPTION, ("autoregressive", 200)),
}
MARKED = [pytest.param(*run, marks=pytest.mark.slow if run in SLOW else pytest.mark.long) for run in RUNS]


@pytest.mark.parametrize(
    "architecture,task,objective_and_steps", MARKED, ids=lambda x: x if isinstance(x, str) else x[0]
)
def test_eight_examples_are_reproduced_exactly(architecture, task, objective_and_steps, tmp_path):
    objective, steps = objective_and_steps
    flags = [
        "--gin_file=recipes/overfit.gin",
        f"--gin_file=models/{architecture}.gin",
        f"--gin_file=objectives/{objective}.gin",
        f"--gin_file=decoding/{objective}.gin",
        f"--gin.MIXTURE_OR_TASK_NAME={task}",
        f"--gin.MODEL_DIR={tmp_path}",
        f"--gin.TRAIN_STEPS={steps}",
    ]
    # In a process of its own, which compiles for speed: other tests compile much and compute little.
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-m", "diffusion_t5x.train", *flags], check=True, env=environment, timeout=1200)
    predictions = (tmp_path / "inference_eval" / task / f"predictions_{steps}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in predictions]
    assert len(records) == 8
    assert [record["prediction"] for record in records] == [record["targets_pretokenized"] for record in records]
    assert len({record["prediction"] for record in records}) == 8
