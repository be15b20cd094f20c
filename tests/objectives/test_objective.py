"""The pieces that objectives share: cross-entropy against optax and numpy, T5's loss normalisers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Ratio
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.objective import LossSums, normalized
from diffusion_t5x.objectives.sundae import Sundae

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal((2, 5, 7))).astype(np.float32)
LABELS = RNG.integers(0, 7, (2, 5))


def test_cross_entropy_is_optax_s():
    loss, nll = cross_entropy(LOGITS, LABELS)
    np.testing.assert_allclose(nll, optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS), rtol=1e-5)
    np.testing.assert_array_equal(loss, nll)


@pytest.mark.parametrize("smoothing", [0.1, 0.6])
def test_label_smoothing_is_t5x_s(smoothing):
    loss, nll = cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
    # T5X shares the rest among the other V - 1 ids, optax among all V.
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 7), smoothing * 7 / 6)
    entropy = -(1 - smoothing) * np.log(1 - smoothing) - smoothing * np.log(smoothing / 6)
    expected = optax.softmax_cross_entropy(LOGITS, targets) - entropy
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(nll, cross_entropy(LOGITS, LABELS)[1])
    perfect = np.full((1, 7), np.log(smoothing / 6), np.float32)
    perfect[0, 3] = np.log(1 - smoothing)
    np.testing.assert_allclose(cross_entropy(perfect, np.array([3]), label_smoothing=smoothing)[0], 0, atol=1e-6)


def test_z_loss():
    loss, nll = cross_entropy(LOGITS, LABELS, z_loss=0.1)
    log_z = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(loss - nll, 0.1 * log_z**2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize,denominator", [("target_tokens", 6), ("all_tokens", 10), ("sequences", 2)])
def test_t5s_loss_normalizers(normalize, denominator):
    batch = tiny.one_a_row([([], [1, 2, 3, 4]), ([], [5, 6])], length=5)
    ratio = normalized(batch, jnp.ones((2, 5)), normalize)
    assert ratio.denominator == pytest.approx(denominator)
    assert ratio.numerator == pytest.approx(min(denominator, 6))


def test_mean_over_sequences_counts_packed_ones_one_by_one():
    batch = tiny.pack([[([5], [6, 7]), ([8, 9], [4]), ([3], [])], [([], [4, 5, 6])]], length=9)
    loss = RNG.standard_normal((2, 9)).astype(np.float32)
    ratio = normalized(batch, loss, "sequences")
    means = [loss[0, 1:3].mean(), loss[0, 5], loss[1, :3].mean()]
    assert ratio.numerator == pytest.approx(sum(means), rel=1e-6)
    assert ratio.denominator == pytest.approx(3)


def test_loss_outside_targets_is_dropped():
    batch = tiny.pack([[([5, 6], [7, 8])]], length=6)
    for normalize in ("target_tokens", "all_tokens", "sequences"):
        plain, changed = (
            normalized(batch, jnp.array([[x, x, 1.0, 2.0, x, x]]), normalize).numerator for x in (0.0, 1e6)
        )
        assert plain == changed > 0


def test_sums_add_up_and_empty_ones_are_zero():
    parts = [LossSums(Ratio(jnp.float32(x), jnp.float32(y)), {"m": Ratio(jnp.float32(y), jnp.float32(x))})
             for x, y in ((3, 2), (5, 6))]  # fmt: skip
    total = parts[0] + parts[1]
    assert total.loss.mean() == 1 and total.metrics["m"].mean() == 1  # (3 + 5) / (2 + 6), not (3/2 + 5/6) / 2
    assert Ratio(jnp.float32(0), jnp.float32(0)).mean() == 0


def test_row_keys_follow_their_examples():
    keys = jax.random.key_data(row_keys(jax.random.key(0), jnp.array([4, 7, 4])))
    assert (keys[0] == keys[2]).all() and (keys[0] != keys[1]).any()


@pytest.mark.parametrize("objective", [Autoregressive, Masked, Sundae])
def test_unknown_normalizers_are_refused(objective):
    with pytest.raises(UserError, match="target_tokens"):
        objective(normalize="tokens")
