"""Masked diffusion's loss: its exact expectation against closed forms, and the draws that it is an expectation of."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.output import Output
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives import masked
from diffusion_t5x.objectives.masked import Masked, mask_targets
from diffusion_t5x.objectives.objective import stratified

KEY = jax.random.key(0)
START = 21  # what a masked first token is read as; not pad, so that one cannot stand for the other
VOCABULARY = dataclasses.replace(tiny.VOCABULARY, start_id=START)
DEFINITION = ModelDefinition(tiny.RELATIVE, VOCABULARY)
TABLE = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
TABLE[:, 23:] = 9.0  # MASK and what is no id would come first


class Neighbours(tiny.TableModel):
    """A position's logits are a sum of what the two tokens beside it say; its own token says nothing."""

    def __call__(self, tokens, slots, kind, encoded=None, dropout_keys=None):
        before, after = jnp.roll(tokens, 1, axis=-1), jnp.roll(tokens, -1, axis=-1)
        said = super().__call__(before, slots, kind, encoded, dropout_keys).hidden
        return Output(said + 2 * self.table[after])


def expected_losses(monkeypatch, objective, model, batch, nodes):
    """Each row's expected summed loss, from the objective itself: all mask patterns, and Gauss-Legendre over the time.

    Exact for the linear schedule, whose integrand is a polynomial in t of the number of targets, when nodes are as
    many. All rows have the same target positions.
    """
    targets = np.flatnonzero(batch.target_mask[0])
    patterns = np.zeros((2 ** len(targets), batch.tokens.shape[1]), bool)
    patterns[:, targets] = list(itertools.product([False, True], repeat=len(targets)))
    points, weights = np.polynomial.legendre.leggauss(nodes)
    times, weights = (points + 1) / 2, weights / 2

    def one(row, time, pattern):
        probability_of_pattern = 0

        def this_pattern(batch, vocabulary, probability, keys):
            nonlocal probability_of_pattern
            probability_of_pattern = jnp.prod(jnp.where(pattern, probability, 1 - probability)[0, targets])
            return jnp.where(pattern, vocabulary.mask_id, batch.tokens)

        with monkeypatch.context() as patch:
            patch.setattr(masked, "stratified", lambda key, rows, columns: jnp.full(columns.shape, 1 - time))
            patch.setattr(masked, "mask_targets", this_pattern)
            sums = objective.loss(model, jax.tree.map(lambda x: x[None], row), KEY)
        return sums.loss.numerator * probability_of_pattern

    over_patterns = jax.vmap(one, (None, None, 0))
    over_times = jax.vmap(over_patterns, (None, 0, None))
    losses = jax.jit(jax.vmap(over_times, (0, None, None)))(batch, times.astype(np.float32), patterns)
    return np.asarray(losses, np.float64).sum(-1) @ weights


PAIRS = TokenIds(3, pad_id=0, eos_id=1, mask_id=2, start_id=2, noise_ranges=((0, 2),))
JOINT = np.array([[0.4, 0.1], [0.1, 0.4]], np.float32)


@pytest.mark.parametrize("schedule,nodes", [("linear", 2), ("cosine", 12)])
@pytest.mark.parametrize("context,expected", [(True, 1.193550), (False, 1.386294)])
def test_expected_loss_of_known_distributions(monkeypatch, schedule, nodes, context, expected):
    """With the true conditionals it is the joint entropy, with marginals alone the sum of theirs, at any schedule."""
    conditionals = np.stack([*JOINT / JOINT.sum(1, keepdims=True), JOINT.sum(0)])  # given 0, 1 and MASK
    table = np.full((3, 3), 5.0, np.float32)  # MASK would be likeliest of all
    table[:, :2] = np.log(conditionals if context else 0.5)

    class Other(tiny.TableModel):
        def __call__(self, tokens, *args):
            return super().__call__(tokens[:, ::-1], *args)

    batch = tiny.one_a_row([([], pair) for pair in itertools.product([0, 1], repeat=2)])
    objective = Masked(schedule=schedule, epsilon=0.0)
    losses = expected_losses(monkeypatch, objective, Other(jnp.asarray(table), PAIRS), batch, nodes)
    assert (losses * JOINT.reshape(-1)).sum() == pytest.approx(expected, abs=2e-6)


ROW = tiny.one_a_row(tiny.random_examples(1, [(3, 4)]), length=9)


@functools.cache
def cross_entropies_by_number():
    """l -> the mean over the patterns with l masked targets of the summed cross-entropy of those, in numpy."""
    found = {}
    for number in range(1, 5):
        sums = []
        for places in itertools.combinations(range(3, 7), number):
            read = ROW.tokens[0].copy()
            read[list(places)] = 23
            logits = (TABLE[np.roll(read, 1)] + 2 * TABLE[np.roll(read, -1)]).astype(np.float64)[:, :23]
            nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(9), np.minimum(ROW.tokens[0], 22)]
            sums.append(nll[list(places)].sum())
        found[number] = np.mean(sums)
    return found


@pytest.mark.parametrize("schedule,nodes", [("linear", 4), ("cosine", 20)])
def test_weighting_by_time_is_weighting_by_number(monkeypatch, schedule, nodes):
    """E_t[(1/t) sum of masked] = E_l[(L/l) sum of masked], l uniform in 1..L; inputs and padding do not count."""
    objective, model = Masked(schedule=schedule, epsilon=0.0), Neighbours(jnp.asarray(TABLE), VOCABULARY)
    loss = expected_losses(monkeypatch, objective, model, ROW, nodes).item()
    assert loss == pytest.approx(
        np.mean([4 / number * ce for number, ce in cross_entropies_by_number().items()]), rel=1e-5
    )


def test_uniform_weighting_counts_each_masked_token_once(monkeypatch):
    model = Neighbours(jnp.asarray(TABLE), VOCABULARY)
    loss = expected_losses(monkeypatch, Masked(weighting="uniform", epsilon=0.0), model, ROW, 5).item()
    # A pattern of l out of 4 has the expected probability l! (4 - l)! / 5!, so a number l has 1 / 5.
    assert loss == pytest.approx(sum(cross_entropies_by_number().values()) / 5, rel=1e-5)


def discrepancy(numbers):
    """The greatest difference between the share of numbers below a bound and the bound."""
    numbers, n = np.sort(np.asarray(numbers).reshape(-1)), np.size(numbers)
    return max(np.abs(numbers - np.arange(n) / n).max(), np.abs(numbers - np.arange(1, n + 1) / n).max())


@pytest.mark.parametrize("rows", [slice(None), slice(300, 500), slice(3, None, 4), slice(0, 8)])
def test_numbers_of_a_batch_are_evener_than_independent_ones(rows):
    ids = np.arange(1000, dtype=np.int32)[rows] + 2_000_000_000
    columns = np.broadcast_to(np.arange(1, 4, dtype=np.int32), (len(ids), 3))
    numbers = np.asarray(stratified(KEY, ids, columns))
    assert numbers.min() >= 0 and numbers.max() < 1
    for some in [numbers, *numbers.T]:  # the examples of a packed batch; rows with one example
        # Independent ones have about 0.87 / sqrt(n), and less than 0.42 / sqrt(n) once in 1000 times.
        assert discrepancy(some) < min(4 / len(ids), 0.42 / np.sqrt(len(ids)))


def test_each_number_is_uniform_over_the_keys():
    keys = jax.random.split(KEY, 2000)
    numbers = jax.vmap(lambda key: stratified(key, jnp.array([5, 6]), jnp.array([[1], [2]])))(keys)
    for one in numbers.reshape(2000, 2).T:
        assert discrepancy(one) < 2.2 / np.sqrt(2000)  # Kolmogorov-Smirnov at 1e-4


@pytest.fixture
def draw(monkeypatch):
    """A function of an objective and a batch: what the model reads, and the probability of being masked there."""
    drawn = []

    def spy(batch, vocabulary, probability, keys):
        drawn.append(np.asarray(probability))
        return mask_targets(batch, vocabulary, probability, keys)

    monkeypatch.setattr(masked, "mask_targets", spy)
    return lambda objective, batch: (np.asarray(objective.model_inputs(DEFINITION, batch, KEY)), drawn.pop())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_targets_are_masked_independently_with_the_probability_of_the_time(draw, schedule):
    rows = 500
    tokens, probability = draw(Masked(schedule=schedule, epsilon=0.2), tiny.one_a_row([([7], [5] * 80)] * rows))
    where, probability = tokens[:, 1:] == 23, probability[:, 1:]
    assert (probability == probability[:, :1]).all()
    times = np.sort(probability[:, 0] if schedule == "linear" else np.arcsin(probability[:, 0]) * 2 / np.pi)
    np.testing.assert_allclose(times, 0.2 + 0.8 * (np.arange(rows) + 0.5) / rows, atol=3 / rows)
    clear = (probability[:, 0] > 0.05) & (probability[:, 0] < 0.95)
    z = (where[clear] - probability[clear]) / np.sqrt(probability[clear] * (1 - probability[clear]))
    for product in (z, z[1:] * z[:-1], z[:, 1:] * z[:, :-1], z**2 - 1):  # mean, rows, positions, variance
        assert abs(product.mean()) < 5 * product.std() / np.sqrt(product.size)


def test_packed_examples_have_times_of_their_own_and_inputs_stay(draw):
    batch = tiny.pack([[([5, 6], [7] * 5), ([8], [9] * 4)]] * 50, length=14)
    tokens, probability = draw(Masked(), batch)
    np.testing.assert_array_equal(tokens[~batch.target_mask], batch.tokens[~batch.target_mask])
    changed = tokens != batch.tokens
    assert (tokens[changed] == 23).all() and 0.4 < changed[batch.target_mask].mean() < 0.6
    first, second = probability[:, :7], probability[:, 7:12]
    assert (first == first[:, :1]).all() and (second == second[:, :1]).all()
    apart = np.abs(first[:, 0] - second[:, 0]) / (1 - 1e-3)  # by the fraction of sqrt(2), or what is left to 1
    np.testing.assert_allclose(np.minimum(apart, 1 - apart), 2**0.5 - 1, atol=1e-5)


BATCH = tiny.pack(
    [tiny.random_examples(n, [(n % 3, 5), (2, 3)]) for n in range(7)] + [tiny.random_examples(9, [(4, 8)])],
    16,
    first_id=70,
)


# Else every operation is compiled alone.
model_inputs = jax.jit(Masked.model_inputs, static_argnums=(0, 1))


def test_a_masked_first_token_is_read_as_the_start_token():
    """START stands in for MASK in each packed example without inputs, else MASK stays."""
    batch = tiny.pack([[([], [5, 6, 7]), ([8], [9, 10]), ([], [11, 12])]] * 40, length=9)
    tokens = np.asarray(model_inputs(Masked(epsilon=0.5), DEFINITION, batch, KEY))
    for place, clean in enumerate([5, 6, 7, 8, 9, 10, 11, 12, 0]):
        read_as = {START} if place in (0, 6) else set() if place in (3, 8) else {23}
        assert set(tokens[:, place].tolist()) == {clean} | read_as


@pytest.mark.parametrize("rows", [[3, 0, 6, 1, 7, 5, 4, 2], [0, 2, 5, 7], [6]])
def test_what_a_row_reads_is_its_own_in_any_batch(rows):
    whole, part = (model_inputs(Masked(), DEFINITION, b, KEY) for b in (BATCH, tiny.rows_of(BATCH, rows)))
    np.testing.assert_array_equal(part, whole[np.array(rows)])
    other = model_inputs(Masked(), DEFINITION, BATCH, jax.random.key(1))
    assert (other != whole).any(axis=1).sum() > 4


@pytest.mark.parametrize("normalize", ["target_tokens", "sequences"])
def test_loss_of_a_batch_is_that_of_its_parts(normalize):
    @jax.jit
    def sums(batch):
        return Masked(normalize=normalize).loss(tiny.TableModel(jnp.asarray(TABLE), VOCABULARY), batch, KEY)

    parts = [sums(tiny.rows_of(BATCH, rows)) for rows in ([6, 1, 3, 4], [0, 2, 5, 7])]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), parts[0] + parts[1], sums(BATCH))


@pytest.mark.parametrize(("weighting", "softmax"), [("elbo", "allowed"), ("uniform", "allowed"), ("elbo", "all")])
def test_loss_and_metrics_follow_from_what_is_read(weighting, softmax):
    model = Neighbours(jnp.asarray(TABLE), VOCABULARY)
    sums = Masked(weighting=weighting, softmax=softmax).loss(model, BATCH, KEY)
    [(tokens, slots, kind, dropout_keys)] = model.calls
    jax.tree.map(np.testing.assert_array_equal, slots, Slots.of(BATCH))
    assert kind == BIDIRECTIONAL and dropout_keys.shape == (8,)

    tokens = np.roll(tokens, -1, axis=1)  # it notes the tokens before
    np.testing.assert_array_equal(tokens, model_inputs(Masked(), DEFINITION, BATCH, KEY))
    where = (tokens == 23) | (tokens == START)
    of_all = TABLE[np.roll(tokens, 1, axis=1)] + 2 * TABLE[np.roll(tokens, -1, axis=1)]
    logits = of_all[..., :23]
    over = np.exp(of_all if softmax == "all" else logits).sum(-1)
    nll = np.log(over) - np.take_along_axis(logits, BATCH.tokens[..., None], -1)[..., 0]
    time = 1 - (1 - 1e-3) * stratified(stream(KEY, "time"), BATCH.example_ids, BATCH.segment_ids)
    bound = (nll / time)[where].sum() / BATCH.target_mask.sum()
    expected = bound if weighting == "elbo" else nll[where].sum() / BATCH.target_mask.sum()
    assert float(sums.loss.mean()) == pytest.approx(float(expected), rel=1e-5)
    assert float(sums.metrics["nll_bound"].mean()) == pytest.approx(float(bound), rel=1e-5)
    right = (logits.argmax(-1) == BATCH.tokens)[where]
    assert float(sums.metrics["accuracy"].mean()) == pytest.approx(right.mean())
    assert float(sums.metrics["mask_fraction"].mean()) == pytest.approx(where.sum() / BATCH.target_mask.sum())


def test_gradient_lives_on_masked_targets_and_on_what_may_be_written():
    def loss(added):
        return (
            Masked().loss(tiny.TableModel(jnp.asarray(TABLE), VOCABULARY, added), BATCH, KEY, train=False).loss.mean()
        )

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((1, *BATCH.tokens.shape, 32)))[0])
    where = np.isin(model_inputs(Masked(), DEFINITION, BATCH, KEY), [23, START])
    assert where.any() and (where != BATCH.target_mask).any()
    assert (gradient[~where] == 0).all() and (gradient[..., 23:] == 0).all()
    assert (np.abs(gradient[where]).max(axis=-1) > 1e-4).all()


def test_dropout_is_of_training_alone():
    model = tiny.TableModel(jnp.asarray(TABLE), VOCABULARY)
    jax.eval_shape(lambda: Masked().loss(model, BATCH, KEY, train=False))
    assert model.calls[0][-1] is None


@pytest.mark.parametrize("bad", [{"schedule": "quadratic"}, {"weighting": "none"}, {"epsilon": 1.0}, {"epsilon": -0.1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError):
        Masked(**bad)
