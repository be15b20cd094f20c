"""Block diffusion with times from a part of [0, 1]: closed forms of loss, variance and likelihood."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.evaluator import Evaluator
from diffusion_t5x.evaluation.noise_times import TimesEval
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.partitioning import MeshConfig

MASK = tiny.VOCABULARY.mask_id
CLIPPED = (0.45, 0.95)
BATCH = tiny.one_a_row(tiny.random_examples(0, [(2, 12)] * 600))
CHOICES = MASK  # ids that may be written: all but MASK
UNIFORM = tiny.TableModel(jnp.zeros((24, 24)))  # every token has -log p = log 23, whatever is read


def test_clipped_times_keep_the_weights_of_the_bound():
    """Masks fall with probability t ~ U(0.45, 0.95], and weigh 1/t."""
    noisy, weights = (
        np.asarray(x)[:, 2:] for x in Block(4, times=CLIPPED).corrupt(tiny.VOCABULARY, BATCH, jax.random.key(0))
    )
    times = 1 / weights[:, ::4].ravel()  # of 1800 blocks
    assert times.min() > 0.45 - 1e-6 and times.max() < 0.95 + 1e-6
    np.testing.assert_allclose(np.quantile(times, [0.1, 0.5, 0.9]), [0.5, 0.7, 0.9], atol=0.01)
    assert (noisy == MASK).mean() == pytest.approx(0.7, abs=0.02)


def test_clipped_training_logs_no_bound_and_evaluation_draws_from_all_times():
    objective, key = Block(4, times=CLIPPED), jax.random.key(0)
    train = objective.loss(UNIFORM, BATCH, key)
    assert "nll_bound" not in train.metrics
    held_out, full = (each.loss(UNIFORM, BATCH, key, train=False) for each in (objective, Block(4)))
    assert held_out.metrics["nll_bound"].mean() == held_out.loss.mean() == full.loss.mean()
    assert train.loss.mean() != full.loss.mean()
    assert "nll_bound" in Block(4).loss(UNIFORM, BATCH, key).metrics


@dataclasses.dataclass(frozen=True)
class Held:
    name: str = "held out"

    def eval_batches(self):
        yield BATCH, []


class Definition:
    @staticmethod
    def bind(params):
        return UNIFORM


def test_the_search_measures_the_variance_in_closed_form():
    """k of a block's two targets are masked, each with probability t; the loss is log(23) k / (2t), of mean log 23.

    E[(k/t)^2 | t] = 2/t + 2, so the variance is log(23)^2 / 2 (E[1/t] - 1), with E[1/t] = log(b/a) / (b - a).
    """
    search = TimesEval(Held(), times=((0.1, 0.6), (0.3, 0.8), (0.5, 1.0), (0.9, 0.9), (0.897, 0.897)), num_draws=4)
    evaluator = Evaluator(MeshConfig().make(jax.devices()[:1]), Definition, Block(2), (), (), times_evals=[search])
    found = evaluator.times({})["held out"]
    for low, high in search.times[:3]:
        expected = math.log(CHOICES) ** 2 / 2 * (math.log(high / low) / (high - low) - 1)
        # 14,400 blocks: five standard errors.
        assert found[f"variance_{low:g}_{high:g}"] == pytest.approx(expected, rel=0.08)
        assert found[f"mean_{low:g}_{high:g}"] == pytest.approx(math.log(CHOICES), rel=0.04)
    assert found["variance_0.9_0.9"] == pytest.approx(math.log(CHOICES) ** 2 / 2 * (1 / 0.9 - 1), rel=0.15)
    assert (found["times_low"], found["times_high"]) == (0.9, 0.9) and len(found) == 2 * 5 + 2


@pytest.mark.slow
def test_masked_blocks_of_one_are_trained_as_the_autoregressive_model():
    """A shifted model with everything masked: loss and gradients are those of `Autoregressive`, to 1e-6 and 1e-5."""
    definition, params = tiny.make_model(dataclasses.replace(tiny.LLAMA, shifted=True))
    batch = tiny.pack([tiny.random_examples(0, [(3, 5), (1, 6)]), tiny.random_examples(1, [(2, 7)])], 20)

    def loss(objective, params):
        return objective.loss(definition.bind(params), batch, jax.random.key(0)).loss.mean()

    (found, gradient), (expected, of_autoregressive) = (
        jax.jit(jax.value_and_grad(lambda params, each=each: loss(each, params)))(params)
        for each in (Block(1, times=(1.0, 1.0), softmax="all"), Autoregressive())
    )
    assert found == pytest.approx(float(expected), rel=1e-6)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(of_autoregressive))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * largest), gradient, of_autoregressive)


def test_blocks_of_one_have_the_same_mean_for_any_times():
    """So their loss is logged as a bound, and evaluation draws from the same times: here without any variance."""
    objective = Block(1, times=(1.0, 1.0))
    for train in (True, False):
        sums = objective.loss(UNIFORM, BATCH, jax.random.key(0), train=train)
        assert sums.metrics["nll_bound"].mean() == pytest.approx(math.log(CHOICES), rel=1e-6)
    part = Block(1, times=(0.5, 0.7)).loss(UNIFORM, BATCH, jax.random.key(0))
    assert part.metrics["nll_bound"].mean() == pytest.approx(math.log(CHOICES), rel=0.04)  # 7,200 targets


def test_mistakes():
    for times in ((0.5, 0.4), (-0.1, 1), (0.5, 1.1), (0, 0), (0.5,), 0.5):
        with pytest.raises(UserError, match="times"):
            Block(times=times)
    for objective in (Autoregressive(), Block(noise="uniform", weighting="uniform"), None):
        with pytest.raises(UserError, match="block diffusion"):
            Evaluator(
                MeshConfig().make(jax.devices()[:1]), Definition, objective, (), (), times_evals=[TimesEval(Held())]
            )
