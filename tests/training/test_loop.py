"""The training loop: what happens at which step, and that a resumed run is the undisturbed run."""

import logging
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x.checkpointing import checkpoints, restoring
from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training import loop
from diffusion_t5x.training.bad_numbers import BadNumbers, Judge
from diffusion_t5x.training.goodput import KINDS, Goodput
from diffusion_t5x.training.loop import Periods, Reporting, Saving, TrainLoop, headline
from diffusion_t5x.training.state import TrainState
from diffusion_t5x.training.step import make_train_step


class Batches:
    """Batches of random examples, numbered; every example is drawn from its batch's number."""

    def __init__(self):
        self.next = 0

    def next_batch(self, state):
        self.next += 1
        return tiny.one_a_row(tiny.random_examples(self.next, [(2, 3), (1, 6), (4, 2), (0, 5)]), length=8)

    def state_dict(self):
        return {"next": np.array(self.next)}

    def load_state_dict(self, state):
        self.next = int(state["next"])


class Recorder:
    """A writer, and an evaluation, that note what they are given."""

    def __init__(self):
        self.written, self.evaluated, self.shares = {}, {}, {}

    def write(self, step, folder, metrics):
        written = {"train": self.written, "goodput": self.shares}[folder]
        assert step not in written
        written[step] = metrics

    def evaluate(self, state, step):
        assert int(state.step) == step and step not in self.evaluated
        self.evaluated[step] = jax.device_get(state.params)
        return {"score": float(step)}


MESH = MeshConfig().make()


@jax.jit
def count(state, batch, loss_limit):
    """Stands in for a step: the loss of step s is s squared."""
    step = state.step + 1
    metrics = {"loss": jnp.float32(step**2), "tokens": jnp.sum(batch.segment_ids > 0)}
    return TrainState(step=step, params={"sum": state.params["sum"] + step}, opt_state=()), metrics


def run(folder, *, total_steps, periods, start=0, train_step=count, state=None, batches=None, **more):
    batches = batches or Batches()
    recorder, store = more.get("recorder", Recorder()), checkpoints.Checkpoints(folder, keep_last=99)
    if state is None:
        state = TrainState(step=jnp.int32(start), params={"sum": jnp.int32(0)}, opt_state=())
    try:
        judge, goodput = more.get("judge", Judge(BadNumbers(), folder)), more.get("goodput", Goodput())
        train_loop = TrainLoop(
            mesh=MESH,
            train_step=train_step,
            batches=batches,
            evaluate=recorder.evaluate,
            total_steps=total_steps,
            periods=periods,
            saving=Saving(store, {"config": "text"}, more.get("check_folder", lambda: None)),
            reporting=Reporting(recorder, judge, goodput, hang_timeout=more.get("hang_timeout")),
        )
        final = train_loop.run(state, more.get("evaluation_due", False))
    finally:
        store.close()
    assert checkpoints.steps(folder)[-1:] == [total_steps] or start == total_steps  # it is there when the loop returns
    return final, recorder


@pytest.mark.parametrize(
    "periods,logs,evals,saves",
    [
        (Periods(log=4, eval=3, save=5), [4, 8, 10], [3, 6, 9, 10], [5, 10]),
        (Periods(log=1, eval=None, save=100), list(range(1, 11)), [], [10]),
        (Periods(log=5, eval=2, save=2), [5, 10], [2, 4, 6, 8, 10], [2, 4, 6, 8, 10]),
        (Periods(log=5, eval=10, save=9, eval_start=True), [5, 10], [0, 10], [9, 10]),
        (Periods(log=10, eval=None, save=10, eval_start=True), [10], [], [10]),
    ],
)
def test_everything_happens_at_its_steps(tmp_path, periods, logs, evals, saves):
    final, recorder = run(tmp_path, total_steps=10, periods=periods)
    assert int(final.step) == 10 and int(final.params["sum"]) == 55
    assert sorted(recorder.evaluated) == evals
    assert all(params["sum"] == step * (step + 1) // 2 for step, params in recorder.evaluated.items())
    assert checkpoints.steps(tmp_path) == saves

    assert sorted(recorder.written) == logs
    for before, step in zip([0, *logs], logs, strict=False):
        metrics = recorder.written[step]
        # The mean of all steps since the last time, whatever was evaluated or saved in between.
        assert metrics["loss"] == pytest.approx(np.mean([s**2 for s in range(before + 1, step + 1)]))
        assert set(metrics) == {"loss", "tokens_per_second", "seconds_per_step"}
        rows = 23 * (step - before)  # tokens
        assert metrics["tokens_per_second"] * metrics["seconds_per_step"] * (step - before) == pytest.approx(rows)


def test_a_checkpoint_holds_the_step_the_data_position_and_the_evaluation(tmp_path):
    run(tmp_path, total_steps=4, periods=Periods(log=2, eval=4, save=2))
    abstract = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32), params={"sum": jax.ShapeDtypeStruct((), jnp.int32)}, opt_state=()
    )
    for step, metrics in ((2, {}), (4, {"score": 4.0})):
        state, data, metadata = restoring.restore(tmp_path / f"checkpoint_{step}", abstract)
        assert int(state.step) == step and int(data["next"]) == step
        assert metadata == {"config": "text", "step": step, "metrics": metrics}


def test_a_step_that_moves_data_by_itself_raises(tmp_path):
    def careless(state, batch, loss_limit):
        return count(state, batch.replace(segment_ids=np.asarray(batch.segment_ids)), loss_limit)

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path, total_steps=2, periods=Periods(log=1, eval=None, save=9), train_step=careless)
    assert not checkpoints.steps(tmp_path)


def test_a_run_goes_on_from_its_step(tmp_path):
    final, recorder = run(tmp_path, total_steps=10, start=7, periods=Periods(log=2, eval=5, save=5))
    assert int(final.params["sum"]) == 8 + 9 + 10
    assert sorted(recorder.written) == [8, 10] and sorted(recorder.evaluated) == [10]
    _, recorder = run(tmp_path / "b", total_steps=10, start=7, periods=Periods(eval=5, eval_start=True))
    assert sorted(recorder.evaluated) == [10]


def test_a_finished_run_does_nothing(tmp_path):
    _, recorder = run(tmp_path, total_steps=10, start=10, periods=Periods())
    assert not recorder.written and not recorder.evaluated and not checkpoints.steps(tmp_path)


def test_a_resumed_run_is_the_undisturbed_run_bit_for_bit(tmp_path):
    definition, optimizer = tiny.make_model()[0], optax.adamw(1e-2)
    abstract, _ = tiny.fresh_state(MESH, definition, optimizer, keep_ema=True)
    step = make_train_step(MESH, abstract, definition, Sundae(), optimizer, seed=0, ema_decay=0.9)

    def train(folder, total_steps, state=None, batches=None):
        state = state or tiny.fresh_state(MESH, definition, optimizer, keep_ema=True)[1]
        periods = Periods(log=2, eval=None, save=5)
        return run(folder, total_steps=total_steps, periods=periods, train_step=step, state=state, batches=batches)

    whole, recorder = train(tmp_path / "whole", 10)
    train(tmp_path / "parts", 5)
    state, data, _ = restoring.restore(tmp_path / "parts", abstract)
    batches = Batches()
    batches.load_state_dict(data)
    resumed, resumed_recorder = train(tmp_path / "parts", 10, state, batches)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert resumed_recorder.written[8]["loss"] == recorder.written[8]["loss"]
    # Not for want of anything to differ in: the examples and the noise of other steps give other parameters.
    elsewhere, _ = train(
        tmp_path / "elsewhere", 10, state=restoring.restore(tmp_path / "parts/checkpoint_5", abstract)[0]
    )
    assert any(
        (x != y).any() for x, y in zip(jax.tree.leaves(elsewhere.params), jax.tree.leaves(whole.params), strict=True)
    )


@pytest.mark.parametrize("bad", [{"log": 0}, {"eval": 0}, {"save": -1}])
def test_periods_of_no_steps_are_refused(bad):
    with pytest.raises(UserError, match=f"Periods.{next(iter(bad))}"):
        Periods(**bad)


@jax.jit
def spoil(state, batch, loss_limit):
    """As `count`, but the third and the fourth step are bad."""
    state, metrics = count(state, batch, loss_limit)
    bad = (state.step == 3) | (state.step == 4)
    loss = jnp.where(bad, jnp.nan, metrics["loss"])
    return state, metrics | {"loss": loss, "bad": jnp.float32(bad), "gradient_norm": loss}


def test_bad_steps_are_counted_and_not_averaged(tmp_path):
    _, recorder = run(tmp_path, total_steps=6, periods=Periods(log=2, eval=None, save=6), train_step=spoil)
    assert [recorder.written[step]["loss"] for step in (2, 6)] == [2.5, 30.5]
    assert np.isnan(recorder.written[4]["loss"])
    assert [recorder.written[step].get("bad_steps") for step in (2, 4, 6)] == [None, 2, 2]


def test_a_run_with_too_many_bad_steps_ends_and_keeps_its_checkpoints(tmp_path):
    judge = Judge(BadNumbers(max_in_a_row=2), str(tmp_path))
    with pytest.raises(UserError, match="Step 4 is bad, the last of 2 in a row"):
        run(tmp_path, total_steps=9, periods=Periods(log=1, eval=None, save=2), train_step=spoil, judge=judge)
    assert checkpoints.steps(tmp_path)[0] == 2


@pytest.mark.slow
def test_a_run_that_ends_with_an_error_leaves_no_clock_behind(tmp_path):
    """The clock of a hanging step would end the process of the run, whatever that does by then."""
    code = f"""
import test_loop, time
try:
    judge = test_loop.Judge(test_loop.BadNumbers(policy="halt"), {str(tmp_path)!r})
    test_loop.run({str(tmp_path)!r}, total_steps=9, periods=test_loop.Periods(log=1, eval=None, save=9),
                  train_step=test_loop.spoil, judge=judge, hang_timeout=3.0)
except test_loop.UserError:
    time.sleep(4)
    print("still here")
"""
    paths = [str(pathlib.Path(__file__).parent), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == "still here\n", done.stderr


def test_the_time_of_a_run_is_shared_out(tmp_path):
    """An evaluation of 0.3 s is at least 0.3 s of it; all shares make one."""

    class Slow(Recorder):
        def evaluate(self, state, step):
            time.sleep(0.3)
            return super().evaluate(state, step)

    start = time.monotonic()
    goodput = Goodput()
    _, recorder = run(tmp_path, total_steps=4, periods=Periods(log=2, eval=4, save=4), recorder=Slow(), goodput=goodput)
    took = time.monotonic() - start
    shares = goodput.shares()
    assert sorted(recorder.shares) == [2, 4] and set(shares) == {*KINDS, "steps"}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    assert shares["evaluation"] * took >= 0.3 * 0.98
    assert "evaluation" in str(goodput)


class Failing(Recorder):
    """An evaluation that raises until it is mended."""

    mended = False

    def evaluate(self, state, step):
        if not self.mended:
            raise UserError("The target 'a' has no answer.")
        return super().evaluate(state, step)


@pytest.mark.parametrize("periods,step", [(Periods(log=2, eval=4, save=4), 4), (Periods(log=2, eval=3, save=9), 3)])
def test_an_evaluation_that_fails_leaves_the_steps_and_is_made_up_for(tmp_path, periods, step):
    recorder = Failing()
    with pytest.raises(UserError, match="has no answer"):
        run(tmp_path, total_steps=8, periods=periods, recorder=recorder)
    assert checkpoints.steps(tmp_path) == [step]
    abstract = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32), params={"sum": jax.ShapeDtypeStruct((), jnp.int32)}, opt_state=()
    )
    state, data, metadata = restoring.restore(tmp_path, abstract)
    assert int(state.params["sum"]) == step * (step + 1) // 2 and int(data["next"]) == step
    assert metadata == {"config": "text", "step": step, "metrics": {}, "evaluation_due": True}

    def go_on():
        batches = Batches()
        batches.load_state_dict(data)
        state = jax.device_put(restoring.restore(tmp_path / f"checkpoint_{step}", abstract)[0])
        more = {"recorder": recorder, "batches": batches, "state": state, "evaluation_due": True}
        return run(tmp_path, total_steps=8, periods=periods, start=step, **more)

    with pytest.raises(UserError, match="has no answer"):  # not mended yet: it begins with the same evaluation
        go_on()
    assert checkpoints.steps(tmp_path) == [step]
    recorder.mended = True
    final, _ = go_on()
    assert int(final.params["sum"]) == 36 and sorted(recorder.evaluated) == sorted({step, *range(step, 9, step), 8})
    assert checkpoints.read_metadata(tmp_path / f"checkpoint_{step}")["metrics"] == {"score": float(step)}
    assert checkpoints.read_metadata(tmp_path)["metrics"] == {"score": 8.0}


def test_an_evaluation_begins_when_its_steps_are_saved(tmp_path):
    class Looks(Recorder):
        def evaluate(self, state, step):
            deadline = time.monotonic() + 60  # it is written in the background
            while checkpoints.steps(tmp_path)[-1:] != [step] and time.monotonic() < deadline:
                time.sleep(0.01)
            assert checkpoints.read_metadata(tmp_path)["evaluation_due"]
            return super().evaluate(state, step)

    _, recorder = run(tmp_path, total_steps=4, periods=Periods(log=2, eval=2, save=2), recorder=Looks())
    assert sorted(recorder.evaluated) == [2, 4]


@pytest.mark.parametrize("gone_at", [1, 3])
def test_a_folder_that_is_removed_ends_the_run(tmp_path, gone_at):
    """At a log, and at the very end."""
    asked = []

    def check_folder():
        asked.append(None)
        if len(asked) == gone_at:
            raise UserError("the folder was removed")

    with pytest.raises(UserError, match="was removed"):
        run(tmp_path, total_steps=4, periods=Periods(log=2, eval=None, save=9), check_folder=check_folder)
    assert len(asked) == gone_at


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"loss": 2.0, "nll": 2.0, "accuracy": 0.5, "tokens": 8.0}, {"loss": 2.0, "accuracy": 0.5}),
        ({"loss": 2.0, "mask_fraction": 0.3, "nll_bound": 3.0}, {"loss": 2.0, "nll_bound": 3.0}),
        ({"loss": 2.0, "loss_1": 1.0, "accuracy_1": 0.5, "accuracy_2": 0.6}, {"loss": 2.0, "accuracy_1": 0.5}),
        ({"loss": 2.0, "ar_nll": 1.0}, {"loss": 2.0}),
    ],
)
def test_progress_shows_the_metrics_that_matter(metrics, shown):
    assert headline(metrics) == shown


def test_the_first_step_says_that_it_compiles(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(loop.logger, "propagate", False)
    loop.logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, loop.logger.name)
    try:
        run(tmp_path, total_steps=2, periods=Periods(eval=None))
    finally:
        loop.logger.removeHandler(caplog.handler)
    compiling, compiled = [message for message in caplog.messages if "compil" in message]
    assert compiling == "compiling the training step …" and compiled.startswith("compiled in ")
