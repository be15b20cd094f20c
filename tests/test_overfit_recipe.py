"""Every architecture, pretraining task and objective learns eight examples by heart, through gin alone."""

import json

import pytest

from diffusion_t5x import config, train


@pytest.mark.slow
@pytest.mark.parametrize("objective,steps", [("autoregressive", 200), ("sundae", 1200)])
@pytest.mark.parametrize("task", ["overfit_prefix_lm", "overfit_span_corruption"])
@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_decoder"])
def test_eight_examples_are_reproduced_exactly(architecture, task, objective, steps, tmp_path):
    config.run(
        train.train,
        [
            "--gin_file=recipes/overfit.gin",
            f"--gin_file=models/{architecture}.gin",
            f"--gin_file=objectives/{objective}.gin",
            f"--gin_file=decoding/{objective}.gin",
            f"--gin.MIXTURE_OR_TASK_NAME={task}",
            f"--gin.MODEL_DIR={tmp_path}",
            f"--gin.TRAIN_STEPS={steps}",
        ],
    )
    predictions = (tmp_path / "inference_eval" / task / f"predictions_{steps}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in predictions]
    assert len(records) == 8
    assert [record["prediction"] for record in records] == [record["targets_pretokenized"] for record in records]
    assert len({record["prediction"] for record in records}) == 8
