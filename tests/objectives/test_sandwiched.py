"""Evidence bounds of texts against the likelihood of writing them token by token in every order."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from whole_rollouts import make_rollout_step

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, AttentionKind, Slots
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.objectives.sandwiched import MaskedSandwichedPolicyGradient, SandwichedPolicyGradient, _masked_in

KEY = jax.random.key(1)
MASK, INPUTS, SIZE = tiny.VOCABULARY.mask_id, (5, 9), 3
TEXTS = [(4, 4, 4), (7, 3, 12), (19, 8, 3), (1, 0, 5)]


@functools.cache
def make_model():
    definition, _ = tiny.make_model(dataclasses.replace(tiny.LLAMA, num_layers=1))
    return definition, tiny.random_params(definition, 3)


@functools.cache
def in_all_orders(kind):
    """Log-probabilities `[text, order, state, token]`, -inf where a token is not masked; state k hides all but k."""
    definition, params = make_model()
    orders = list(itertools.permutations(range(SIZE)))
    rows, masked = [], []
    for text, order, seen in itertools.product(TEXTS, orders, range(SIZE)):
        hidden = [order[place] >= seen for place in range(SIZE)]  # order[place] is the token's rank
        rows.append((INPUTS, [MASK if hide else token for hide, token in zip(hidden, text, strict=True)]))
        masked.append(hidden)
    batch, shape = tiny.one_a_row(rows), (len(TEXTS), len(orders), SIZE, SIZE)

    @jax.jit
    def read(params):
        model = definition.bind(params)
        hidden = model(batch.tokens, Slots.of(batch), kind).hidden
        return jax.nn.log_softmax(forbid(model.logits(hidden), tiny.VOCABULARY))[:, len(INPUTS) :]

    labels = np.repeat(TEXTS, len(orders) * SIZE, axis=0)
    found = np.take_along_axis(np.asarray(read(params), np.float64), labels[..., None], axis=-1)[..., 0]
    return np.array(orders), np.where(masked, found, -np.inf).reshape(shape)


def texts_in_all_orders(orders):
    """Each text with the states of each order: the first is the one with the fewest masks."""
    batch = tiny.one_a_row([(INPUTS, text) for text in TEXTS for _ in orders])
    at = np.full(batch.tokens.shape, -1, np.int32)
    at[:, len(INPUTS) :] = np.tile(SIZE - 1 - orders, (len(TEXTS), 1))
    return batch.replace(written_at=at)


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        (SandwichedPolicyGradient(SIZE, draws=SIZE), AttentionKind("block_causal", SIZE)),
        (MaskedSandwichedPolicyGradient(draws=SIZE), BIDIRECTIONAL),
    ],
    ids=["block", "canvas"],
)
def test_the_bounds_hold_the_likelihood_between_them(objective, kind):
    orders, log_p = in_all_orders(kind)
    definition, params = make_model()
    batch = texts_in_all_orders(orders)
    found = jax.jit(lambda params: objective.bounds(definition.bind(params), batch))(params)
    lower, upper = (np.asarray(x)[:, len(INPUTS) :].reshape(len(TEXTS), len(orders), SIZE) for x in found[:2])

    # A token is drawn in the state that shows exactly those before it.
    drawn = np.take_along_axis(log_p, orders[None, :, None, :].repeat(len(TEXTS), 0), axis=2)[:, :, 0].sum(-1)
    likelihood = np.log(np.exp(drawn).mean(axis=1))
    np.testing.assert_allclose(lower.sum(-1).mean(axis=1), drawn.mean(axis=1), rtol=1e-5)
    assert (lower.sum(-1).mean(axis=1) < likelihood).all()

    weights = (1 / (SIZE - np.arange(SIZE)))[:, None]  # n / l over the number of states
    means = (weights * np.exp(SIZE * log_p)).sum(axis=2)
    np.testing.assert_allclose(upper, np.log(means) / SIZE, rtol=1e-4)
    exact = (np.log(means.mean(axis=1)) / SIZE).sum(-1)
    assert (likelihood < exact).all() and (upper.sum(-1).mean(axis=1) < exact).all()


@pytest.mark.parametrize("draws", [1, 2])
def test_fewer_states_weigh_every_token_once_on_average(draws):
    """States are nested, and each number of masks is as likely as the others."""
    objective = SandwichedPolicyGradient(4, draws=draws)
    batch = tiny.one_a_row([(INPUTS, [7] * 6)] * 3000)
    batch = batch.replace(written_at=np.where(batch.target_mask, 0, -1).astype(np.int32))

    @jax.jit
    def run(batch):
        batch = batch.replace(written_at=objective._states(batch, KEY))
        masked = [_masked_in(batch, number) for number in range(draws)]
        return batch.written_at, masked, [objective._weights(batch, np.full((3000, 1), s)) for s in range(draws)]

    at, masked, weights = jax.device_get(run(batch))
    total = sum(np.where(m, w, 0) for m, w in zip(masked, weights, strict=True))[:, len(INPUTS) :]
    assert (np.abs(total.mean(axis=0) - 1) < 4 * total.std(axis=0) / np.sqrt(3000)).all()
    assert (at[:, : len(INPUTS)] == -1).all() and (at[:, len(INPUTS) :] >= 0).all()
    for block, size in ((slice(2, 6), 4), (slice(6, 8), 2)):
        counts = np.stack([m[:, block].sum(-1) for m in masked])
        if draws == 2:
            assert (counts[0] < counts[1]).all() and not (masked[0] & ~masked[1]).any()
        share = np.bincount(counts.reshape(-1), minlength=size + 1)[1:] / counts.size
        np.testing.assert_allclose(share, 1 / size, atol=0.03)


@functools.cache
def rollout(draws):
    """Eight texts that a decoder wrote, in blocks of two, and the objective."""
    definition, params = make_model()
    objective = SandwichedPolicyGradient(2, draws=draws, upper_weight=0.5)
    decoder = BlockDecoder(2, MaskedDecoder(order="confidence", temperature=0.7))
    prompts = tiny.one_a_row([(INPUTS, [0] * 5)] * 8)
    texts = jax.device_get(
        make_rollout_step(definition, decoder, prepare=objective.prepare_rollout)(params, prompts, 0)
    )
    return params, objective, texts.replace(advantage=np.linspace(-1, 1, 8, dtype=np.float32))


@functools.cache
def program(objective):
    """The jitted `(params, batch) -> (gradient of the loss's numerator, sums)`."""
    definition, _ = make_model()

    def loss(params, batch):
        sums = objective.loss(definition.bind(params), batch, KEY)
        return sums.loss.numerator, sums

    return jax.jit(jax.grad(loss, has_aux=True))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.slow
def test_before_the_first_update_the_gradient_is_that_of_the_bounds():
    params, objective, texts = rollout(2)
    definition, _ = make_model()
    gradient, sums = program(objective)(params, texts)
    np.testing.assert_allclose(sums.metrics["ratio"].mean(), 1, atol=1e-6)
    count = (texts.written_at >= 0).sum(-1)
    np.testing.assert_allclose(sums.loss.numerator, -(count * texts.advantage).sum(), rtol=1e-5)
    assert sums.loss.denominator == texts.tokens.size and sums.metrics["clip_fraction"].mean() == 0

    @jax.jit
    @jax.grad
    def expected(params):
        lower, upper, _ = objective.bounds(definition.bind(params), texts)
        lower, upper = lower.sum(-1), upper.sum(-1)
        bound = jnp.where(texts.advantage > 0, lower, (lower + upper) / 2)
        return -jnp.sum(texts.advantage * bound)

    np.testing.assert_allclose(flat(gradient), flat(expected(params)), atol=2e-5)


@pytest.mark.slow
def test_a_text_that_has_moved_far_enough_in_the_right_direction_is_left_alone():
    params, objective, texts = rollout(2)
    for moved in (1, -1):
        written = texts.written_at >= 0
        before = texts.written_log_probability - np.where(written, 0.5 * moved, 0).astype(np.float32)
        for advantage in (1, -1):
            moved_texts = texts.replace(written_log_probability=before, advantage=np.full(8, advantage, np.float32))
            gradient, sums = program(objective)(params, moved_texts)
            is_cut = moved == advantage
            assert (flat(gradient) == 0).all() == is_cut and sums.metrics["clip_fraction"].mean() == is_cut
            np.testing.assert_allclose(sums.metrics["ratio"].mean(), np.exp(0.5 * moved), rtol=1e-4)


def test_mistakes():
    for wrong, message in (
        ({"draws": 0}, "draws"),
        ({"upper_weight": 1.5}, "upper_weight"),
        ({"power": 0.5}, "power"),
        ({"clip": (0.0, 0.2)}, "SandwichedPolicyGradient.clip"),
    ):
        with pytest.raises(UserError, match=message):
            SandwichedPolicyGradient(SIZE, **wrong)
    definition, params = make_model()
    batch = tiny.one_a_row([(INPUTS, TEXTS[0])])
    with pytest.raises(UserError, match="SandwichedPolicyGradient has a loss only on"):
        SandwichedPolicyGradient(SIZE).loss(definition.bind(params), batch, KEY)
