"""SUNDAE: the noise in numbers, the floors of its first loss, and what may and may not flow through an unroll."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives import sundae
from diffusion_t5x.objectives.objective import cross_entropy, row_keys
from diffusion_t5x.objectives.sundae import Sundae, corrupt

FLOORS = {2: 0.562335, 4: 1.073543, 27: 2.261174}  # nats a token, of i.i.d. uniform data


class Table:
    """Stands in for a model: the logits at a position are a row of a table, chosen by the token that is read there."""

    def __init__(self, table, vocabulary=tiny.VOCABULARY, added=None):
        self.table, self.vocabulary, self.added, self.calls = table, vocabulary, added, []

    def __call__(self, tokens, slots, kind, dropout_keys=None):
        self.calls.append((tokens, slots, kind, dropout_keys))
        logits = self.table[tokens]
        return logits if self.added is None else logits + self.added[len(self.calls) - 1]

    def map_logits(self, fn, hidden, *per_position):
        return fn(hidden, *per_position)


def vocabulary_of(size):
    """`size` noise ids and a MASK."""
    return TokenIds(size + 1, pad_id=0, eos_id=1, mask_id=size, start_id=0, noise_ranges=((0, size),))


def uniform_batch(size, rows, length, seed=0):
    """Rows of i.i.d. uniform targets."""
    tokens = np.random.default_rng(seed).integers(0, size, (rows, length))
    return tiny.one_a_row([([], row) for row in tokens.tolist()])


@functools.partial(jax.jit, static_argnums=1)
def corrupted(batch, vocabulary, key):
    return corrupt(batch, vocabulary, row_keys(key, batch.example_ids))


def noisy(batch, vocabulary, seed=0):
    return np.asarray(corrupted(batch, vocabulary, jax.random.key(seed)))


# --- the noise


@pytest.mark.parametrize("size,expected", [(27, 0.48148), (4, 0.375)])
def test_expected_share_of_changed_tokens(size, expected):
    rows = 8000
    batch = uniform_batch(size, rows, 40)
    changed = (noisy(batch, vocabulary_of(size)) != batch.tokens).mean(axis=1)
    assert expected == pytest.approx(0.5 * (1 - 1 / size), abs=1e-5)
    assert abs(changed.mean() - expected) < 4 * changed.std() / np.sqrt(rows)  # 4 standard errors: about 0.013


def test_noise_level_is_uniform():
    batch = uniform_batch(27, 2000, 400)
    changed = (noisy(batch, vocabulary_of(27)) != batch.tokens).mean(axis=1)
    levels = np.sort(changed / (1 - 1 / 27))
    # Kolmogorov-Smirnov at 1e-4 (2.2 / sqrt(2000)); a row of 400 tells its level within about 0.025.
    assert np.abs(levels - (np.arange(2000) + 0.5) / 2000).max() < 2.2 / np.sqrt(2000) + 0.01


def test_packed_examples_have_levels_of_their_own():
    rng = np.random.default_rng(0)
    batch = tiny.pack([[tiny.random_example(rng, 0, 50), tiny.random_example(rng, 0, 50)] for _ in range(400)], 100)
    changed = (noisy(batch, tiny.VOCABULARY) != batch.tokens).reshape(400, 2, 50).mean(axis=2)
    assert abs(np.corrcoef(changed.T)[0, 1]) < 4 / np.sqrt(400)
    assert changed.std(axis=0).min() > 0.2


def test_noise_is_uniform_over_the_noise_vocabulary_and_on_targets_alone():
    batch = tiny.one_a_row([([20, 21] * 5, [22] * 30)] * 3000, length=45)  # no clean token is a noise id
    tokens = noisy(batch, tiny.VOCABULARY)
    np.testing.assert_array_equal(tokens[~batch.target_mask], batch.tokens[~batch.target_mask])
    ids, counts = np.unique(tokens[batch.target_mask], return_counts=True)
    assert ids.tolist() == [*tiny.VOCABULARY.noise_ids(), 22]
    share = counts[:-1] / counts[:-1].sum()
    assert np.abs(share - 1 / 19).max() < 5 * np.sqrt(1 / 19 / counts[:-1].sum())


def test_noise_follows_the_example_and_not_its_place():
    batch = tiny.one_a_row(tiny.random_examples(0, [(2, 9), (5, 4), (0, 12), (3, 3)]))
    tokens = noisy(batch, tiny.VOCABULARY)
    for rows in ([3, 1, 0, 2], [2], [1, 3]):
        np.testing.assert_array_equal(noisy(tiny.rows_of(batch, rows), tiny.VOCABULARY), tokens[rows])
    longer = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 7))) if x.ndim == 2 else x, batch)
    np.testing.assert_array_equal(noisy(longer, tiny.VOCABULARY)[:, :12], tokens)
    assert (noisy(batch, tiny.VOCABULARY, seed=1) != tokens).any()


# --- the first loss


def exact_posterior(size, length):
    """`P(x_1 | z)` as `[*z, x_1]`, and `H(x_1 | z)` in nats, for rows of that many uniform tokens under one α.

    From the joint distribution of all clean and noisy rows, integrated over α by Gauss-Legendre quadrature.
    """
    nodes, weights = np.polynomial.legendre.leggauss(length + 1)
    joint = 0  # [x_1, .., x_n, z_1, .., z_n]
    for alpha, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        channel = ((1 - alpha) * np.eye(size) + alpha / size) / size  # P(x, z) of one token
        row = functools.reduce(np.multiply.outer, [channel] * length)
        joint = joint + weight * row
    joint = np.moveaxis(joint, range(0, 2 * length, 2), range(length))
    joint = joint.sum(axis=tuple(range(1, length)))  # [x_1, *z]
    posterior = np.moveaxis(joint / joint.sum(axis=0), 0, -1)
    return posterior, -(np.moveaxis(joint, 0, -1) * np.log(posterior)).sum()


@pytest.mark.parametrize("size,length", [(2, 4), (4, 3), (27, 1)])
def test_floor_is_the_entropy_given_the_whole_noisy_row(size, length):
    posterior, entropy = exact_posterior(size, length)
    assert entropy == pytest.approx(FLOORS[size], abs=1e-6)
    # On such data a token's neighbours tell nothing: not what it was, nor how much noise there is.
    for others in itertools.product(range(size), repeat=length - 1):
        here = posterior[(slice(None), *others)]
        np.testing.assert_allclose(here, posterior[(slice(None), *[0] * (length - 1))], rtol=1e-9)


@pytest.mark.parametrize("size", FLOORS)
def test_the_best_predictor_attains_the_floor_and_others_do_not(size):
    rows = 8000
    batch, vocabulary = uniform_batch(size, rows, 40), vocabulary_of(size)

    @jax.jit
    def row_losses(posterior):
        """The objective's loss of each row."""
        table = jnp.pad(jnp.log(posterior), ((0, 1), (0, 1)), constant_values=-1e9)  # MASK is never read nor written
        per_row = jax.tree.map(lambda x: x[:, None], batch)
        key, objective, model = jax.random.key(3), Sundae(num_unrolls=0), Table(table, vocabulary)
        return jax.lax.map(
            lambda row: objective.loss(model, row, key, train=False).loss.mean(), per_row, batch_size=500
        )

    posterior, _ = exact_posterior(size, 1)
    best = np.asarray(row_losses(posterior))
    assert abs(best.mean() - FLOORS[size]) < 4 * best.std() / np.sqrt(rows)  # about 0.04 of 2.26, 0.006 of 0.56
    for shift in (-0.1, 0.1):  # surer that a token is what it was, or less sure
        other = posterior + shift * (np.eye(size) - (1 - np.eye(size)) / (size - 1))
        assert row_losses(other).mean() > best.mean() + 0.005


def test_a_trained_model_comes_to_the_floor_and_not_below():
    """Whatever the model could see of the clean targets would take it below."""
    vocabulary = vocabulary_of(4)
    config = ModelConfig(embed_dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32, vocab_size=8)
    definition = ModelDefinition(config, vocabulary)
    params = tiny.random_params(definition)
    optimizer, objective = optax.adam(1e-2), Sundae(num_unrolls=0)
    example = uniform_batch(4, 128, 16)

    def step(carry, key):
        params, opt_state = carry
        data_key, noise_key = jax.random.split(key)
        batch = example.replace(tokens=jax.random.randint(data_key, (128, 16), 0, 4))
        loss, grads = jax.value_and_grad(lambda p: objective.loss(definition.bind(p), batch, noise_key).loss.mean())(
            params
        )
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    keys = jax.random.split(jax.random.key(0), 300)
    _, losses = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys))(params)
    last = np.asarray(losses[-100:])
    standard_error = last.std() / np.sqrt(100)
    assert FLOORS[4] - 4 * standard_error < last.mean() < FLOORS[4] + 0.02 + 4 * standard_error


# --- the unroll


BATCH = tiny.pack([tiny.random_examples(0, [(3, 5), (2, 4)]), tiny.random_examples(1, [(4, 8)])], 16)
TABLE = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)


def test_each_pass_reads_clean_inputs_and_the_output_of_the_pass_before():
    model = Table(jnp.asarray(TABLE))
    sums = Sundae(num_unrolls=2).loss(model, BATCH, jax.random.key(0))
    read = [np.asarray(tokens) for tokens, *_ in model.calls]
    targets = BATCH.target_mask
    assert len(read) == 3
    for tokens in read:
        np.testing.assert_array_equal(tokens[~targets], BATCH.tokens[~targets])
    np.testing.assert_array_equal(read[1][targets], TABLE[read[0]].argmax(-1)[targets])
    np.testing.assert_array_equal(read[2][targets], TABLE[read[1]].argmax(-1)[targets])
    assert (read[0] != read[1]).any() and (read[1] != read[2]).any()
    for _, slots, kind, dropout_keys in model.calls:
        assert kind == BIDIRECTIONAL
        jax.tree.map(np.testing.assert_array_equal, slots, Slots.of(BATCH))
        assert dropout_keys.shape == (2,)
    assert len({jax.random.key_data(keys).tobytes() for *_, keys in model.calls}) == 3

    terms = [cross_entropy(TABLE[tokens], BATCH.tokens)[0][targets] for tokens in read]
    for number, (tokens, term) in enumerate(zip(read, terms, strict=True), start=1):
        assert float(sums.metrics[f"loss_{number}"].mean()) == pytest.approx(float(term.mean()), rel=1e-5)
        accuracy = (TABLE[tokens].argmax(-1) == BATCH.tokens)[targets].mean()
        assert float(sums.metrics[f"accuracy_{number}"].mean()) == pytest.approx(accuracy)
    assert float(sums.loss.mean()) == pytest.approx(sum(float(term.mean()) for term in terms), rel=1e-5)
    changed = (read[0] != BATCH.tokens)[targets].mean()
    assert float(sums.metrics["noise_fraction"].mean()) == pytest.approx(changed)


def test_evaluation_switches_dropout_off():
    model = Table(jnp.asarray(TABLE))
    Sundae().loss(model, BATCH, jax.random.key(0), train=False)
    assert [keys for *_, keys in model.calls] == [None, None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_loss_and_gradient_live_on_targets_alone(temperature):
    def loss(added):
        model = Table(jnp.asarray(TABLE), added=added)
        return Sundae(temperature=temperature).loss(model, BATCH, jax.random.key(0)).loss.mean()

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 2, 16, 32)))
    assert (gradient[:, ~BATCH.target_mask] == 0).all()
    assert (jnp.abs(gradient[:, BATCH.target_mask]).max(axis=-1) > 1e-4).all()
    elsewhere = np.where(BATCH.target_mask[..., None], 0, 100 * TABLE[:16, None].swapaxes(0, 1))
    assert loss(jnp.asarray(np.stack([elsewhere, -elsewhere]))) == value


def test_no_gradient_flows_through_what_is_read_back():
    definition, params = tiny.make_model()
    objective, key = Sundae(num_unrolls=1), jax.random.key(0)

    def two_terms(params):
        model = definition.bind(params)
        read = []

        class Spy:
            vocabulary, map_logits = model.vocabulary, model.map_logits

            def __call__(self, tokens, *args):
                read.append(tokens)
                return model(tokens, *args)

        return objective.loss(Spy(), BATCH, key).loss.mean(), read

    gradient, read = jax.jit(jax.grad(two_terms, has_aux=True))(params)

    @jax.jit
    @jax.grad
    def one_term(params, tokens):
        model = definition.bind(params)
        loss, _ = cross_entropy(model.logits(model(tokens, Slots.of(BATCH), BIDIRECTIONAL)), BATCH.tokens)
        return jnp.sum(loss * BATCH.target_mask) / BATCH.target_mask.sum()

    terms = [one_term(params, tokens) for tokens in read]
    assert len(read) == 2 and (read[0] != read[1]).any()
    expected = jax.tree.map(jnp.add, *terms)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), gradient, expected)
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(gradient))


def test_weights_of_the_terms():
    def loss(**settings):
        return Sundae(**settings).loss(Table(jnp.asarray(TABLE)), BATCH, jax.random.key(0))

    plain = loss()
    assert loss(weights=(1.0, 0.0)).loss.mean() == loss(num_unrolls=0).loss.mean() == plain.metrics["loss_1"].mean()
    np.testing.assert_allclose(loss(weights=(0.0, 3.0)).loss.mean(), 3 * plain.metrics["loss_2"].mean(), rtol=1e-6)


def test_a_warm_unroll_samples_from_the_softmax():
    rows, length = 400, 30
    batch = tiny.one_a_row([([], [5] * length)] * rows)
    logits = np.zeros((32, 32), np.float32)
    logits[:, 7:10], logits[:, 3] = [2.0, 1.0, 0.0], 3.0
    model = Table(jnp.asarray(logits))
    Sundae(num_unrolls=2, temperature=2.0).loss(model, batch, jax.random.key(0))
    expected = np.exp(logits[0] / 2.0) / np.exp(logits[0] / 2.0).sum()
    first, second = (np.asarray(tokens) for tokens, *_ in model.calls[1:])
    for tokens in (first, second):
        share = np.bincount(tokens.reshape(-1), minlength=32) / tokens.size
        assert (np.abs(share - expected) < 5 * np.sqrt(expected / tokens.size)).all()
    by_chance = (expected**2).sum()
    for x, y in ((first, second), (first[:-1], first[1:]), (first[:, :-1], first[:, 1:])):  # passes, rows, positions
        assert abs((x == y).mean() - by_chance) < 5 * np.sqrt(by_chance / x.size)


@pytest.mark.parametrize("config", [tiny.RELATIVE, tiny.LLAMA], ids=["relative", "rotary"])
def test_packed_examples_lose_what_they_lose_alone(monkeypatch, config):
    """With noise that depends on the token alone; the loss of each example is then a number of its own."""
    monkeypatch.setattr(
        sundae,
        "corrupt",
        lambda batch, vocabulary, keys: jnp.where(batch.target_mask & (batch.tokens % 3 == 0), 7, batch.tokens),
    )
    definition, params = tiny.make_model(config)
    examples = tiny.random_examples(2, [(3, 5), (2, 4), (4, 3), (0, 6)])

    def sums(batch):
        objective = Sundae(normalize="sequences")
        return jax.jit(lambda p: objective.loss(definition.bind(p), batch, jax.random.key(0), train=False))(params)

    alone = sums(tiny.one_a_row(examples, 16))
    packed = sums(tiny.pack([examples[:2], examples[2:]], 16))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), packed, alone)


@pytest.mark.parametrize(
    "bad", [{"num_unrolls": -1}, {"temperature": -1.0}, {"weights": (1.0,)}, {"num_unrolls": 0, "weights": (1.0, 1.0)}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError):
        Sundae(**bad)
