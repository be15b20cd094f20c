"""`train` as users run it: a run, stopped and resumed, adapted; and every mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from quickstart_runs import FINETUNE, PRETRAIN, arrays, steps

from diffusion_t5x import train
from diffusion_t5x.checkpointing import checkpoints, manifest
from diffusion_t5x.command_line import config
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.training import beginning
from diffusion_t5x.training.lock import FILE as LOCK
from diffusion_t5x.training.lock import locked


def test_a_run_leaves_what_t5x_users_expect(pretrained, finetuned):
    assert (pretrained / "config.gin").read_text().count("TRAIN_STEPS = 20") == 1
    assert "params" not in (pretrained / "model-info.txt").read_text().splitlines()[0]
    assert [line["step"] for line in steps(pretrained)] == list(range(1, 21))
    assert steps(pretrained)[-1]["loss"] < steps(pretrained)[0]["loss"]
    assert list((pretrained / "train").glob("events*"))
    assert (pretrained / "training_eval" / "quickstart_pretrain" / "metrics.jsonl").exists()
    scores = json.loads((finetuned / "inference_eval" / "quickstart_pairs" / "metrics.jsonl").read_text())
    assert scores["step"] == 3 and 0 <= scores["exact_match"] <= 100
    assert (
        len((finetuned / "inference_eval" / "quickstart_pairs" / "predictions_3.jsonl").read_text().splitlines()) == 8
    )


@pytest.mark.slow
def test_the_resolved_config_repeats_the_run(pretrained, tmp_path):
    flags = [f"--gin_file={pretrained / 'config.gin'}", f"--gin.MODEL_DIR={tmp_path}", "--gin.TRAIN_STEPS=20"]
    config.run(train.train, flags)
    assert [line["loss"] for line in steps(tmp_path)] == [line["loss"] for line in steps(pretrained)]


def test_a_finished_run_started_again_does_nothing(pretrained):
    def times():
        return {path: path.stat().st_mtime_ns for path in pretrained.rglob("*") if path.is_file() and path.name != LOCK}

    before = times()
    config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={pretrained}"])
    assert times() == before


@pytest.mark.slow
def test_a_broken_newest_checkpoint_stops_a_run_unless_an_older_one_is_allowed(pretrained, tmp_path, capsys):
    model_dir = shutil.copytree(pretrained, tmp_path / "model")
    (model_dir / LOCK).unlink()
    file = next(path for path in (model_dir / "checkpoints/checkpoint_20/state/d").iterdir())
    os.truncate(file, file.stat().st_size - 1)
    before = sorted((path, path.stat().st_mtime_ns) for path in model_dir.rglob("*") if path.is_file())
    flags = [*PRETRAIN, f"--gin.MODEL_DIR={model_dir}", "--gin.Periods.save=100", "--gin.Periods.eval=None"]
    with pytest.raises(SystemExit) as stopped:
        config.run(train.train, [*flags, "--gin.TRAIN_STEPS=22"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and f"checkpoint_20 is broken: state/d/{file.name} has" in message
    assert "newest intact one is" in message and "checkpoint_15" in message
    (model_dir / LOCK).unlink()
    assert sorted((path, path.stat().st_mtime_ns) for path in model_dir.rglob("*") if path.is_file()) == before

    flags += ["--gin.train.train.allow_older_checkpoint=True", "--gin.TRAIN_STEPS=20"]
    config.run(train.train, [*flags])
    assert f"resuming from {model_dir}/checkpoints/checkpoint_15" in capsys.readouterr().err
    assert {path.name for path in (model_dir / "checkpoints").iterdir()} == {"broken_checkpoint_20", "checkpoint_20"}
    for name, array in arrays(pretrained).items():
        np.testing.assert_array_equal(array, arrays(model_dir)[name], err_msg=name)


def test_a_second_run_in_a_model_dir_stops_before_it_writes_anything(pretrained, tmp_path, capsys):
    with locked(str(tmp_path)):
        with pytest.raises(SystemExit) as stopped:
            config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={tmp_path}"])
        assert stopped.value.code == 2
        assert f"{tmp_path} is in use by process {os.getpid()} on" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={tmp_path}", "--dry_run"])  # which writes nothing


@pytest.mark.slow
def test_a_run_told_to_stop_again_and_again_is_the_undisturbed_run_bit_for_bit(pretrained, tmp_path):
    command = [sys.executable, "-m", "diffusion_t5x.train", *PRETRAIN, f"--gin.MODEL_DIR={tmp_path}"]
    command += ["--gin.Periods.save=100"]
    for stop_at in (2, 9):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 600
            while not (tmp_path / "train/metrics.jsonl").exists() or len(steps(tmp_path)) < stop_at:
                assert process.poll() is None, "the run ended before it could be told"
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=240) == 75
        finally:
            process.kill()
            process.wait()
        last = len(steps(tmp_path))
        assert stop_at <= last < 20 and checkpoints.steps(tmp_path / "checkpoints") == [last]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert [(line["step"], line["loss"]) for line in steps(tmp_path)] == [
        (line["step"], line["loss"]) for line in steps(pretrained)
    ]
    undisturbed, resumed = arrays(pretrained), arrays(tmp_path)
    for name, array in undisturbed.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


@pytest.mark.slow
def test_adaptation_starts_from_the_parameters_with_a_fresh_optimizer(pretrained, tmp_path, capsys):
    flags = ["--gin_file=recipes/quickstart/adapt.gin", *PRETRAIN[1:], f"--gin.MODEL_DIR={tmp_path}"]
    flags += [f"--gin.INITIAL_CHECKPOINT_PATH={pretrained}", "--gin.TRAIN_STEPS=4", "--gin.Periods.save=1"]
    config.run(train.train, [*flags, "--gin.PEAK_LEARNING_RATE=0.0"])
    log = capsys.readouterr().err
    assert f"initialised from {pretrained}" in log and "at step 0 of 4" in log
    assert re.search(r"^  params/ \(12 arrays\) as in the checkpoint$", log, re.MULTILINE)
    assert re.search(
        r"^  opt_state/ \(\d+ arrays\), step start fresh, by the rule \('step\|opt_state", log, re.MULTILINE
    )
    assert "compiling the training step …" in log and "evaluation at step 4" in log and "\x1b" not in log
    assert log.endswith(f"trained: {tmp_path}\nnext:\n  diffusion-t5x generate --checkpoint {tmp_path}\n")  # a mixture
    before, after = arrays(pretrained), arrays(tmp_path)
    for name in before:
        if name.startswith("params/"):  # a learning rate of zero: what was restored is what is saved
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert after["step"] == 4


def test_dry_run_prints_sizes_and_writes_nothing(tmp_path, capsys):
    model_dir = tmp_path / "never"
    config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={model_dir}", "--dry_run"])
    printed = capsys.readouterr().out
    assert "model: 38,224 parameters" in printed  # 2,048·16 + 2·(4·16·16 + 3·16·32 + 2·16) + 16 + 128·2
    assert "tokens int32[2, 96]" in printed
    assert not model_dir.exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--gin.TRIAN_STEPS=5"], "TRAIN_STEPS"),
        (["--gin.train.train.train_step=5"], "train_steps"),
        (["--gin.ModelConfig.embed_dims=8"], "embed_dim"),
        (["--gin_file=runs/pretrian.gin"], "runs/pretrain.gin"),
        (["--gin.MIXTURE_OR_TASK_NAME=quickstart_pretrian"], "did you mean quickstart_pretrain"),
        (['--gin.TASK_FEATURE_LENGTHS={"inputs": 4096, "targets": 4096}'], "max_length is 4096"),
        (["--gin.INITIAL_CHECKPOINT_PATH=/no/such/folder"], "No checkpoint at /no/such/folder"),
        (["--gin.MODEL_DIR=/dev/null/model"], "Cannot write to /dev/null/model"),
        (["--gin.BATCH_SIZE=0"], "batch size"),
        (["--gin.train.train.num_microbatches=3"], "num_microbatches = 3"),
        (["--gin.WARMUP_STEPS=20"], "cannot warm up"),
    ],
)
def test_a_mistake_is_one_clear_message_before_the_work_starts(flags, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        config.run(train.train, [*PRETRAIN, f"--gin.MODEL_DIR={tmp_path / 'model'}", *flags])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert expected in message
    assert message.count("error: ") == 1 and "Traceback" not in message
    assert not (tmp_path / "model" / "checkpoints").exists()


@pytest.mark.parametrize("dry_run", [["--dry_run"], []])
def test_a_checkpoint_that_does_not_fit_is_listed_parameter_by_parameter(
    pretrained, tmp_path, capsys, monkeypatch, dry_run
):
    """Another size, another head and another vocabulary in one message, before data are read or a state is made."""
    given = tmp_path / "given"
    shutil.copytree(checkpoints.find_checkpoint(str(pretrained)), given / "checkpoint_20")
    (file,) = (path for path in (given / "checkpoint_20" / "metadata").iterdir() if path.name == "metadata")
    metadata = json.loads(file.read_text())
    metadata["vocabulary"] |= {"fingerprint": "0123456789abcdef", "size": 99}
    file.write_text(json.dumps(metadata))
    manifest.write(checkpoints.find_checkpoint(str(given)))
    monkeypatch.setattr(SeqioDataset, "train_iterator", None)
    monkeypatch.setattr(beginning, "init_state", None)
    flags = [*FINETUNE, f"--gin.INITIAL_CHECKPOINT_PATH={given}", f"--gin.MODEL_DIR={tmp_path / 'model'}", *dry_run]
    flags += ["--gin.ModelConfig.mlp_dim=48", "--gin.ModelConfig.tie_embeddings=False"]
    with pytest.raises(SystemExit):
        config.run(train.train, flags)
    assert capsys.readouterr().err.endswith(
        "checkpoint_20: The checkpoint's model has ModelConfig.mlp_dim = 32 (here 48), tie_embeddings = True "
        "(here False). Set the same.\n"
    )
    with pytest.raises(SystemExit):
        config.run(train.train, [*flags, "--gin.train.train.allow_mismatch=True"])
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and "Traceback" not in message
    rows = [" ".join(line.split()) for line in message.splitlines()]
    assert "params/decoder/blocks/mlp/wi_0 float32[2, 16, 48] float32[2, 16, 32]" in rows
    assert "params/head float32[16, 2048] -" in rows
    assert not any(row.startswith("params/decoder/blocks/attention/query") for row in rows)
    assert "size 99" in message and "fingerprint 0123456789abcdef" in message
    assert "mlp_dim = 32 (here 48), tie_embeddings = True (here False)." in message
    assert not (tmp_path / "model" / "checkpoints").exists()


def test_a_mistake_has_no_traceback_and_a_non_zero_status_as_a_process():
    command = [sys.executable, "-m", "diffusion_t5x.train", "--gin_file=runs/pretrian.gin"]
    start = time.monotonic()
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert "error: " in process.stderr and "Traceback" not in process.stderr
    assert time.monotonic() - start < 60
