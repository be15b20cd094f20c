"""Runs whose examples have many lengths compile each program once: nothing after the first evaluation."""

import json

import numpy as np
import pytest
from compiled_programs import compiled
from quickstart_runs import TINY

from diffusion_t5x import train
from diffusion_t5x.command_line import config

LENGTHS = '{"inputs": 24, "targets": 16}'
# Six examples for four rows: the last batch of an evaluation is not full.
NUM_VALIDATION = 6
PACKED = ["--gin.train/seqio_source.SeqioDataset.pack=True", "--gin.CANVAS=False"]
ROLLOUTS = ["--gin_file=runs/reinforce.gin", "--gin.MAX_ROLLOUT_LENGTH=16", "--gin.GROUP_SIZE=2"]
ROLLOUTS += ["--gin.STATES_PER_STEP=1", "--gin.rollout.Rollout.num_batches=2"]
APART = "models/encoder_decoder.gin"
RUNS = {
    "packed": ("models/decoder_only.gin", "autoregressive", "autoregressive", PACKED),
    "canvas": ("models/decoder_only.gin", "sundae", "sundae", ["--gin.evaluator.DecodeEval.samples_per_example=2"]),
    "apart": (APART, "masked", "masked", ["--gin.train.train.num_microbatches=2"]),
    "beams": (APART, "autoregressive", "beam_search", PACKED),
    "blocks": ("models/decoder_only.gin", "block", "block", ["--gin.train.train.ema_decay=0.9"]),
    "rollouts": ("models/decoder_only.gin", "policy_gradient", "block", ROLLOUTS),
}


@pytest.fixture
def files(tmp_path):
    """JSON lines of texts of all lengths, as the value of FILES."""
    rng = np.random.default_rng(0)
    paths = {}
    for split, number in (("train", 30), ("validation", NUM_VALIDATION)):
        paths[split] = tmp_path / f"{split}.jsonl"
        texts = ({name: f"{n} " + "ab " * rng.integers(1, 7) for name in ("inputs", "targets")} for n in range(number))
        paths[split].write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    return json.dumps({split: str(path) for split, path in paths.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_compiles_nothing_after_its_first_evaluation(name, files, tmp_path, monkeypatch):
    model, objective, decoder, settings = RUNS[name]
    flags = [f"--gin_file={model}", "--gin_file=sizes/tiny.gin", f"--gin_file=objectives/{objective}.gin"]
    flags += [f"--gin_file=decoding/{decoder}.gin", "--gin_file=runs/finetune.gin", "--gin_file=tasks/local_jsonl.gin"]
    flags += [*TINY, "--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.VOCABULARY_FILE=None", f"--gin.FILES={files}"]
    flags += [f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}", "--gin.BATCH_SIZE=4", "--gin.TRAIN_STEPS=4"]
    flags += ["--gin.EVAL_PERIOD=2", f"--gin.NUM_DECODED_EXAMPLES={NUM_VALIDATION}"]
    counts = []
    with compiled() as names:
        evaluate = train.evaluate_run

        def counted(*arguments):
            counts.append(len(names))
            results = evaluate(*arguments)
            counts.append(len(names))
            return results

        monkeypatch.setattr(train, "evaluate_run", counted)
        config.run(train.train, [*flags, *settings, f"--gin.MODEL_DIR={tmp_path / 'model'}"])
    before, after = counts[-4:-2]  # of the first evaluation after a step; runs/reinforce.gin has one at the start
    assert len(counts) in (4, 6) and names[:before].count("jit(step)") == 1
    assert counts[0] < counts[1] and names[after:] == []
