"""A small mixture of experts, all the way: untrained, trained autoregressively, converted by two routes, exported."""

import json
import pathlib

import pytest
import safetensors.numpy

from diffusion_t5x import train
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import config
from diffusion_t5x.convert import convert

pytest.importorskip("seqio")

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SHORT = [
    "--gin.BATCH_SIZE=2", "--gin.TRAIN_STEPS=2", "--gin.EVAL_PERIOD=2", "--gin.WARMUP_STEPS=0",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}", "--gin.ModelConfig.scan_unroll=1",
    "--gin.HELD_OUT={'validation': 10.0}", "--gin.Experts.balance_weight=0.01",
]  # fmt: skip
ROUTES = {
    "shifted": ["--gin.FROZEN_DTYPE='nf4'", "--gin.EVAL_STEPS=0"],
    "opdlm": [
        "--gin.LORA=None", "--gin.MIN_ROLLOUT_LENGTH=8", "--gin.MAX_ROLLOUT_LENGTH=8", "--gin.Rollout.num_batches=2",
    ],
}  # fmt: skip


def busiest(run):
    """The load of the busiest expert at the end of a run, as a multiple of the mean load."""
    lines = (run / "train" / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["busiest_expert"]


@pytest.mark.slow
def test_the_whole_way(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    import tiny_qwen3

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n}th of all the expert readers reads on." for n in range(400)))
    tiny_qwen3.write([str(text)], str(tmp_path / "qwen3"), experts=True)
    untrained, start = tmp_path / "untrained", tmp_path / "start"
    convert(["from_hf", str(tmp_path / "qwen3"), "--output", str(untrained)])

    def run(model_dir, initial, *more):
        files = [str(untrained / "model.gin"), *(flag for flag in more if flag.endswith(".gin"))]
        flags = [*SHORT, *(flag for flag in more if not flag.endswith(".gin")), f"--gin.FILES={{'train': '{text}'}}"]
        places = [f"--gin.INITIAL_CHECKPOINT_PATH={initial}", f"--gin.MODEL_DIR={model_dir}"]
        config.run(train.train, [*(f"--gin_file={file}" for file in files), *flags, *places])
        assert 1 <= busiest(model_dir) < 4  # 4 if two of the eight experts read everything

    run(start, untrained, "recipes/conversion/mixture_start.gin", "--gin.EVAL_STEPS=0")
    for route, more in ROUTES.items():
        files = (f"recipes/ar2diff/{route}.gin", "recipes/ar2diff/shared/texts.gin", "hardware/cpu.gin")
        run(tmp_path / route, start, *files, *more)
    assert checkpoints.open_checkpoint(str(tmp_path / "shifted")).record.lora["base_dtype"] == "nf4"
    exported = {}
    for name in ("start", *ROUTES):
        out = tmp_path / f"{name}_hf"
        convert(["to_hf", str(tmp_path / name), "--like", str(untrained), "--output", str(out)])
        exported[name] = safetensors.numpy.load_file(out / "model.safetensors")
        said = json.loads((out / "config.json").read_text())
        assert (said["model_type"], said["num_experts"]) == ("qwen3_moe", 8)
        assert ("diffusion" in said) == (name != "start")
    of_experts = {
        name: [tensors[tensor].tobytes() for tensor in sorted(tensors) if ".experts." in tensor]
        for name, tensors in exported.items()
    }
    assert all(len(tensors) == 3 * 8 * 3 for tensors in of_experts.values())
    for route in ROUTES:  # an expert that reads none of so few tokens stays as it was
        assert any(x != y for x, y in zip(of_experts[route], of_experts["start"], strict=True))
