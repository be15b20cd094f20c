"""Certainty distillation in closed form: a model whose every masked token has the same distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.certainty import Certainty

KEY = jax.random.key(0)
EOS, MASK = tiny.VOCABULARY.eos_id, tiny.VOCABULARY.mask_id
LIKELY, OTHER = 7, 8
# The second text ends before its canvas does.
BATCH = tiny.one_a_row([([5, 6], [LIKELY, OTHER, LIKELY, EOS]), ([9], [OTHER, EOS, 0, 0])] * 40)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_right_tokens_count_with_their_entropy_wrong_ones_do_not(weight):
    row = np.full(32, -np.inf, np.float32)
    row[[LIKELY, OTHER, EOS]] = np.log([0.6, 0.3, 0.1])
    row[MASK] = 9.0  # is never written
    table = jnp.zeros((32, 32)).at[MASK].set(jnp.maximum(row, -1e9))
    objective = Certainty(2, certainty_weight=weight, temperature=0.5)
    sums = objective.loss(tiny.TableModel(table), BATCH, KEY, train=False)

    noisy = np.asarray(objective.noisy(tiny.VOCABULARY, BATCH, KEY))
    labels = BATCH.tokens[(noisy == MASK) & (BATCH.tokens != 0)]
    nll = -np.log([{LIKELY: 0.6, OTHER: 0.3, EOS: 0.1}[int(label)] for label in labels])
    squared = np.array([0.36, 0.09, 0.01])  # over a temperature of 1/2
    p = squared / squared.sum()
    entropy, right = -np.sum(p * np.log(p)), labels == LIKELY
    assert 0 < right.sum() < len(labels) == int(sums.loss.denominator) < BATCH.target_mask.sum()
    np.testing.assert_allclose(sums.loss.mean(), nll.mean() + weight * entropy * right.mean(), rtol=1e-5)
    found = {name: float(ratio.mean()) for name, ratio in sums.metrics.items()}
    assert found == pytest.approx({"nll": nll.mean(), "accuracy": right.mean(), "entropy": entropy}, rel=1e-5)


def test_every_share_of_a_block_is_masked():
    noisy = np.asarray(Certainty(4).noisy(tiny.VOCABULARY, BATCH, KEY))
    counts = np.bincount((noisy == MASK)[BATCH.target_mask].reshape(-1, 4).sum(axis=1), minlength=5)
    assert counts[0] == 0 and (counts[1:] > 0).all()


@pytest.mark.parametrize("bad", [{"certainty_weight": -1.0}, {"temperature": 0.0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError, match=r"Certainty\."):
        Certainty(**bad)
