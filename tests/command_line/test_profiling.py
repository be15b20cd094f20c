"""--profile of the verbs: a trace appears, of the part that was asked for."""

import time

import jax
import jax.numpy as jnp
import pytest
from quickstart_runs import PRETRAIN

from diffusion_t5x import eval as evaluation
from diffusion_t5x import generate, infer, train
from diffusion_t5x.command_line import config, help_pages
from diffusion_t5x.command_line.verbs import VERBS

DECODED = ["--gin.NUM_DECODED_EXAMPLES=2", "--gin.BATCH_SIZE=2"]


def traced(folder):
    """The bytes of the only trace in a folder."""
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    return file.read_bytes()


def two_phases(*, seconds: float = 0.0) -> None:
    """A verb that computes, waits and computes again."""
    for name in ("first_phase", "last_phase"):
        with jax.profiler.TraceAnnotation(name):
            jnp.arange(3).sum().block_until_ready()
        time.sleep(seconds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags,found",
    [
        ([], [True, True]),
        (["--profile_seconds=0.3:9"], [False, True]),
    ],
)
def test_the_part_that_was_asked_for_is_traced(tmp_path, flags, found):
    config.run(two_phases, [f"--profile={tmp_path}", *flags, "--gin.two_phases.seconds=0.6"])
    text = traced(tmp_path)
    assert [name in text for name in (b"first_phase", b"last_phase")] == found


def test_a_run_that_ends_before_is_not_traced_and_it_is_said(tmp_path, capsys):
    config.run(two_phases, [f"--profile={tmp_path}", "--profile_seconds=100:110"])
    assert not list(tmp_path.rglob("*.pb"))
    assert "--profile_seconds begins at 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--profile_seconds=5:5"], "'5:5' is not FROM:TO, two times in seconds such as 60:70"),
        (["--profile_seconds=soon"], "'soon' is not FROM:TO"),
        (["--profile_seconds=0:inf"], "'0:inf' is not FROM:TO"),
        (["--profile=gs://bucket/x"], "--profile=gs://bucket/x: the profiler writes to local folders only"),
        (["--profile=/dev/null/x"], "--profile=/dev/null/x cannot be made: Not a directory"),
    ],
)
def test_mistakes_are_said(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        config.run(two_phases, flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_training_steps_have_their_numbers(tmp_path):
    few = ["--gin.TRAIN_STEPS=2", "--gin.WARMUP_STEPS=0", "--gin.EVAL_STEPS=0", f"--gin.MODEL_DIR={tmp_path / 'model'}"]
    train.main([*PRETRAIN, *few, f"--profile={tmp_path / 'profile'}", "--profile_seconds=0:600"])
    assert b"step_num" in traced(tmp_path / "profile")


def test_every_verb_with_gin_files_has_the_flag():
    verbs = [name for name, verb in VERBS.items() if verb.takes_gin]
    assert {"train", "eval", "infer", "generate", "benchmark decode"} <= set(verbs)
    for name in verbs:
        assert "--profile DIR" in help_pages.asked([*name.split(), "--help"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("seqio")
    from untrained import untrained

    files = "objectives/block.gin", "decoding/block.gin"
    return untrained(tmp_path_factory.mktemp("profiling") / "model", *files, form="new")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["generate", "infer", "eval"])
def test_verbs_that_decode_are_traced(verb, checkpoint, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"inputs": "a", "targets": "b"}\n' * 2)
    read = [f"--checkpoint={checkpoint}", f'--gin.FILES={{"train": "{tmp_path / "few.jsonl"}"}}']
    out = tmp_path / "out"
    calls = {
        "generate": (generate.main, [*read, "--prompt=one"]),
        "infer": (infer.main, [*read, *DECODED, f"--gin.INFER_OUTPUT_DIR={out}", "--gin.SPLIT=train"]),
        "eval": (evaluation.main, [*read, *DECODED, f"--gin.EVAL_OUTPUT_DIR={out}", "--gin.SPLIT=train"]),
    }
    main, flags = calls[verb]
    main([*flags, f"--profile={tmp_path / 'profile'}"])
    assert b"decode" in traced(tmp_path / "profile")
