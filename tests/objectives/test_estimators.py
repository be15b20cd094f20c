"""The reverse KL from tokens that the student drew: means and gradients by enumeration over a small vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from whole_rollouts import make_rollout_step

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.entropy_bounded import EntropyBoundedDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.sampling import Sampling
from diffusion_t5x.objectives.blocks import block_starts
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.divergences import divergence
from diffusion_t5x.objectives.estimators import drawn_now, sampled_kl
from diffusion_t5x.training.ramps import Ramp
from diffusion_t5x.training.rollout import Rollout, check_rollout

TEACHER, STUDENT, OLDER = jnp.asarray(np.random.default_rng(0).normal(0, 1.5, (3, 7)).astype(np.float32))
SAMPLED = {"divergence": "reverse_kl", "estimate": "k1"}
MASK = tiny.VOCABULARY.mask_id


def mean_estimate(student, behaviour, kind, max_weight=None):
    """The estimate's mean over the token, which `behaviour` draws: a sum over the vocabulary."""
    log_q, log_p, drawn = (jax.nn.log_softmax(x) for x in (student, TEACHER, behaviour))
    value, _ = sampled_kl(log_q, log_p, drawn, kind, max_weight)
    return jnp.sum(jnp.exp(jax.lax.stop_gradient(drawn)) * value)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("behaviour", [STUDENT, OLDER], ids=["its own", "an older student's"])
def test_mean_and_gradient_are_those_of_the_reverse_kl(kind, behaviour):
    expected, gradient = jax.value_and_grad(lambda student: divergence(TEACHER, student, "reverse_kl"))(STUDENT)
    found, of_estimate = jax.value_and_grad(lambda student: mean_estimate(student, behaviour, kind))(STUDENT)
    assert found == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(of_estimate, gradient, atol=1e-5)


def test_the_plain_derivatives_would_be_wrong():
    """That of k1 has the mean 0, that of k3 the gradient of the forward KL: neither is differentiated as it stands."""
    log_p, q = jax.nn.log_softmax(TEACHER), jax.nn.softmax(STUDENT)

    def mean(student, k3):
        k1 = jax.nn.log_softmax(student) - log_p
        return jnp.sum(q * (jnp.expm1(-k1) + k1 if k3 else k1))

    np.testing.assert_allclose(jax.grad(mean)(STUDENT, False), 0, atol=1e-6)
    forward = jax.grad(lambda student: divergence(TEACHER, student, "forward_kl"))(STUDENT)
    np.testing.assert_allclose(jax.grad(mean)(STUDENT, True), forward, atol=1e-5)


def test_k3_is_never_negative_and_weights_are_cut():
    log_q, log_p, drawn = (jax.nn.log_softmax(x) for x in (STUDENT, TEACHER, OLDER))
    k1, weights = sampled_kl(log_q, log_p, drawn, "k1")
    k3, _ = sampled_kl(log_q, log_p, drawn, "k3")
    assert (k3 >= 0).all() and (k1 < 0).any() and weights.max() > 1.5
    cut, capped = sampled_kl(log_q, log_p, drawn, "k1", 1.5)
    np.testing.assert_allclose(capped, np.minimum(weights, 1.5))
    np.testing.assert_allclose(cut, k1 * capped / weights, rtol=1e-5)


def test_tokens_of_the_state_are_those_drawn_next():
    """The masked tokens of a block that were written first; none in a block that nobody wrote."""
    batch = tiny.one_a_row([([3], [5, 6, 7, 8, 9, 10, 11, 12])])
    written_at = np.array([[-1, 0, 2, 1, 1, 0, 0, -1, -1]])
    masked = np.array([[0, 0, 1, 1, 1, 1, 0, 1, 1]], bool)
    starts = block_starts(batch, 3)
    np.testing.assert_array_equal(drawn_now(masked, written_at, starts)[0], [0, 0, 0, 1, 0, 1, 0, 0, 0])


@pytest.fixture(scope="module")
def written():
    """A rollout of 400 texts of four tokens in one block of a random order, by a model of five words."""
    vocabulary = dataclasses.replace(tiny.VOCABULARY, size=7, mask_id=6, noise_ranges=((2, 6),), noise_only=True)
    definition, _ = tiny.make_model(tiny.LLAMA)
    definition = dataclasses.replace(definition, vocabulary=vocabulary)
    older = tiny.random_params(definition, 3)
    prompts = tiny.one_a_row([([3, 4], [0] * 4)] * 400)
    decoder = BlockDecoder(4, MaskedDecoder(num_steps=2, order="random", temperature=1.0))
    texts = jax.device_get(make_rollout_step(definition, decoder)(older, prompts, 0))
    return definition, older, texts


@pytest.mark.slow
def test_a_rollouts_log_probabilities_give_weights_of_one_to_the_student_that_wrote_it(written):
    definition, older, texts = written
    sums = Distillation(4, max_weight=None, **SAMPLED).loss(
        definition.bind(older), texts, jax.random.key(1), train=False, teacher=definition.bind(older)
    )
    weight = sums.metrics["importance_weight"]
    assert weight.mean() == pytest.approx(1, abs=1e-4)
    assert weight.denominator == 800  # two tokens in each of two steps, of which one is seen
    k1 = sums.metrics["divergence"].mean()
    assert np.isfinite(k1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_loss_on_an_older_students_texts_estimates_the_students_divergence(written, kind):
    """Against the exact reverse KL at all masked tokens of the same states; 800 draws give both roughly."""
    definition, older, texts = written
    params = jax.tree.map(lambda x, noise: x + 0.02 * noise, older, tiny.random_params(definition, 5))
    teacher = definition.bind(tiny.random_params(definition, 4))

    def loss(params, objective):
        sums = objective.loss(definition.bind(params), texts, jax.random.key(1), train=False, teacher=teacher)
        return sums.loss.mean(), sums.metrics

    objective = Distillation(4, max_weight=None, divergence="reverse_kl", estimate=kind, normalize="target_tokens")
    exact = Distillation(4, divergence="reverse_kl", normalize="target_tokens")
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((found, metrics), gradient), ((expected, _), exact_gradient) = run(params, objective), run(params, exact)
    assert abs(metrics["importance_weight"].mean() - 1) < 0.1
    assert found == pytest.approx(float(expected), rel=0.15)
    flat, exact_flat = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (gradient, exact_gradient))
    cosine = flat @ exact_flat / np.linalg.norm(flat) / np.linalg.norm(exact_flat)
    assert cosine > 0.8, cosine


def test_only_free_draws_count_as_samples():
    free = {"temperature": 1.0, "order": "random"}
    assert MaskedDecoder(**free).samples_model and EntropyBoundedDecoder(temperature=1.0).samples_model
    for changed in ({"order": "confidence"}, {"temperature": 0.9}, {"top_k": 3}, {"top_p": 0.9}, {"ends": "never"}):
        assert not MaskedDecoder(**(free | changed)).samples_model
    assert not EntropyBoundedDecoder().samples_model and not SundaeDecoder().samples_model


def test_a_rollout_that_does_not_sample_the_student_is_refused():
    def check(order="random", **settings):
        rollout = Rollout(BlockDecoder(4, MaskedDecoder(temperature=1.0, order=order)), **settings)
        check_rollout(Distillation(4, **SAMPLED), tiny.LLAMA, rollout, None)

    with pytest.raises(UserError, match="an order other than confidence"):
        check("confidence")
    with pytest.raises(UserError, match="DATA_SHARE = 0"):
        check(data_share=Ramp(0.5, 0.0))


def test_settings_without_an_estimate_are_refused():
    wrongs = (
        {"divergence": "forward_kl"},
        {"states": "random"},
        {"softmax": "all"},
        {"top_k": 4},
        {"teacher_sampling": Sampling(top_p=0.9)},
        {"max_weight": 0.5},
        {"estimate": "k2"},
    )
    for wrong in wrongs:
        with pytest.raises(UserError):
            Distillation(**(SAMPLED | wrong))
    assert Distillation(**SAMPLED).needs_samples and not Distillation().needs_samples
