"""Steps that are not applied: found on the device, counted on the host, the end of a run when there are too many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.objective import LossSums
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training import optimizers
from diffusion_t5x.training.bad_numbers import BadNumbers, Judge
from diffusion_t5x.training.step import make_train_step

MESH = MeshConfig().make()
BATCH = tiny.one_a_row(tiny.random_examples(0, [(2, 3), (1, 6)]), length=8)
GOOD = {"bad": 0.0, "loss": 2.0, "gradient_norm": 1.0}
BAD = {"bad": 1.0, "loss": float("nan"), "gradient_norm": float("nan")}


@dataclasses.dataclass(frozen=True)
class Spoiled(Autoregressive):
    """The loss as it is, and its numerator times a number in steps whose first token says so."""

    factor: float = 1.0

    def loss(self, model, batch, key, train=True, step=None) -> LossSums:
        sums = super().loss(model, batch, key, train, step)
        factor = jnp.where(batch.tokens[0, 0] == 19, jnp.float32(self.factor), 1.0)
        return sums.replace(loss=sums.loss.replace(numerator=sums.loss.numerator * factor))


def marked(batch):
    tokens = np.array(batch.tokens)
    tokens[0, 0] = 19
    return batch.replace(tokens=tokens)


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(factor):
    definition, optimizer = tiny.make_model()[0], optimizers.adamw(1e-2, max_grad_norm=1e-3)
    abstract, state = tiny.fresh_state(MESH, definition, optimizer, keep_ema=True)
    step = make_train_step(MESH, abstract, definition, Spoiled(factor=factor), optimizer, seed=0, ema_decay=0.9)
    before = jax.device_get(state)
    state, metrics = step(state, marked(BATCH))
    assert metrics["bad"] == 1 and not np.isfinite(metrics["loss"]) and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.replace(step=0)), before.replace(step=0))
    state, metrics = step(state, BATCH)
    assert metrics["bad"] == 0 and metrics["clipped"] == 1 and int(state.step) == 2
    changed = jax.tree.map(lambda x, y: np.any(x != y), jax.device_get(state.params), before.params)
    assert all(jax.tree.leaves(changed))


def test_a_loss_above_the_limit_is_not_applied():
    definition, optimizer = tiny.make_model()[0], optax.sgd(0.1)
    abstract, state = tiny.fresh_state(MESH, definition, optimizer)
    step = make_train_step(MESH, abstract, definition, Autoregressive(), optimizer, seed=0)
    before = jax.device_get(state.params)
    state, metrics = step(state, BATCH, float(0))
    assert metrics["bad"] == 1 and np.isfinite(metrics["loss"]) and "clipped" not in metrics
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)
    _, metrics = step(state, BATCH, float(metrics["loss"]))  # the same batch, the same parameters, the same loss
    assert metrics["bad"] == 0


def test_so_many_in_a_row_end_a_run_and_the_batch_is_kept(tmp_path):
    judge = Judge(BadNumbers(max_in_a_row=3), str(tmp_path))
    for step, metrics in enumerate([BAD, BAD, GOOD, BAD, BAD], start=1):
        judge.add(step, metrics, BATCH)
    assert judge.count == 4 and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"Step 6 is bad, the last of 3 in a row: loss nan.*bad_step_6\.npz"):
        judge.add(6, BAD, BATCH)
    with np.load(tmp_path / "bad_step_6.npz", allow_pickle=False) as kept:
        assert set(kept) == {"tokens", "target_mask", "segment_ids", "positions", "example_ids"}
        assert all(np.array_equal(kept[name], getattr(BATCH, name)) for name in kept)


def test_the_first_one_halts_where_that_is_asked_for(tmp_path):
    judge = Judge(BadNumbers(policy="halt"), str(tmp_path))
    judge.add(1, GOOD, BATCH)
    with pytest.raises(UserError, match="Step 2 is bad: loss nan"):
        judge.add(2, BAD, BATCH)


def test_the_limit_is_a_multiple_of_the_median_and_goes_on_with_a_run(tmp_path):
    rules = BadNumbers(spike_factor=3.0, window=25)
    judge = Judge(rules, str(tmp_path))
    losses = np.random.default_rng(0).uniform(1, 2, 40)
    for step, loss in enumerate(losses, start=1):
        assert judge.limit == (3 * np.median(losses[max(0, step - 26) : step - 1]) if step > 20 else np.inf)
        judge.add(step, GOOD | {"loss": loss}, BATCH)
    judge.add(41, {"bad": 1.0, "loss": 99.0, "gradient_norm": 1.0}, BATCH)  # is not remembered
    assert Judge(rules, str(tmp_path), **judge.memory()).limit == judge.limit == 3 * np.median(losses[-25:])
    never = Judge(BadNumbers(), str(tmp_path))
    never.add(1, GOOD, BATCH)
    assert never.limit == np.inf and never.memory() == {}


@pytest.mark.parametrize("wrong", [{"policy": "stop"}, {"max_in_a_row": 0}, {"spike_factor": 1.0}, {"window": 3}])
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match="BadNumbers"):
        BadNumbers(**wrong)
