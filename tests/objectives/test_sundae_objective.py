"""SUNDAE's unrolls: what each pass reads, where loss and gradient live, and what may not flow between passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.objectives import sundae
from diffusion_t5x.objectives.sundae import Sundae

BATCH = tiny.pack([tiny.random_examples(0, [(3, 5), (2, 4)]), tiny.random_examples(1, [(4, 8)])], 16)
TABLE = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
# What is read back is what a decoder could have written: neither MASK (23) nor a row that stands for no id.
WRITABLE = np.where(np.arange(32) < 23, TABLE, -np.inf)


def test_each_pass_reads_clean_inputs_and_the_output_of_the_pass_before():
    model = tiny.TableModel(jnp.asarray(TABLE))
    sums = Sundae(num_unrolls=2).loss(model, BATCH, jax.random.key(0))
    read = [np.asarray(tokens) for tokens, *_ in model.calls]
    targets = BATCH.target_mask
    assert len(read) == 3
    for tokens in read:
        np.testing.assert_array_equal(tokens[~targets], BATCH.tokens[~targets])
    np.testing.assert_array_equal(read[1][targets], WRITABLE[read[0]].argmax(-1)[targets])
    np.testing.assert_array_equal(read[2][targets], WRITABLE[read[1]].argmax(-1)[targets])
    assert (read[0] != read[1]).any() and (read[1] != read[2]).any()
    for _, slots, kind, dropout_keys in model.calls:
        assert kind == BIDIRECTIONAL
        jax.tree.map(np.testing.assert_array_equal, slots, Slots.of(BATCH))
        assert dropout_keys.shape == (2,)
    assert len({jax.random.key_data(keys).tobytes() for *_, keys in model.calls}) == 3

    terms = [cross_entropy(TABLE[tokens], BATCH.tokens)[0][targets] for tokens in read]
    for number, (tokens, term) in enumerate(zip(read, terms, strict=True), start=1):
        assert float(sums.metrics[f"loss_{number}"].mean()) == pytest.approx(float(term.mean()), rel=1e-5)
        accuracy = (WRITABLE[tokens].argmax(-1) == BATCH.tokens)[targets].mean()
        assert float(sums.metrics[f"accuracy_{number}"].mean()) == pytest.approx(accuracy)
    assert float(sums.loss.mean()) == pytest.approx(sum(float(term.mean()) for term in terms), rel=1e-5)
    changed = (read[0] != BATCH.tokens)[targets].mean()
    assert float(sums.metrics["noise_fraction"].mean()) == pytest.approx(changed)


def test_evaluation_switches_dropout_off():
    model = tiny.TableModel(jnp.asarray(TABLE))
    jax.eval_shape(lambda: Sundae().loss(model, BATCH, jax.random.key(0), train=False))
    assert [keys for *_, keys in model.calls] == [None, None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_loss_and_gradient_live_on_targets_alone(temperature):
    @jax.jit
    @jax.value_and_grad
    def loss(added):
        model = tiny.TableModel(jnp.asarray(TABLE), added=added)
        return Sundae(temperature=temperature).loss(model, BATCH, jax.random.key(0)).loss.mean()

    value, gradient = loss(jnp.zeros((2, 2, 16, 32)))
    assert (gradient[:, ~BATCH.target_mask] == 0).all()
    assert (jnp.abs(gradient[:, BATCH.target_mask]).max(axis=-1) > 1e-4).all()
    elsewhere = np.where(BATCH.target_mask[..., None], 0, 100 * TABLE[:16, None].swapaxes(0, 1))
    assert loss(jnp.asarray(np.stack([elsewhere, -elsewhere])))[0] == value


def test_no_gradient_flows_through_what_is_read_back():
    definition, params = tiny.make_model()
    objective, key = Sundae(num_unrolls=1), jax.random.key(0)

    def two_terms(params):
        model = definition.bind(params)
        read = []

        class Spy:
            config, vocabulary = model.config, model.vocabulary
            map_logits, encode = model.map_logits, model.encode

            def __call__(self, tokens, *args):
                read.append(tokens)
                return model(tokens, *args)

        return objective.loss(Spy(), BATCH, key).loss.mean(), read

    gradient, read = jax.jit(jax.grad(two_terms, has_aux=True))(params)

    @jax.jit
    @jax.grad
    def one_term(params, tokens):
        model = definition.bind(params)
        loss, _ = cross_entropy(model.logits(model(tokens, Slots.of(BATCH), BIDIRECTIONAL).hidden), BATCH.tokens)
        return jnp.sum(loss * BATCH.target_mask) / BATCH.target_mask.sum()

    terms = [one_term(params, tokens) for tokens in read]
    assert len(read) == 2 and (read[0] != read[1]).any()
    expected = jax.tree.map(jnp.add, *terms)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), gradient, expected)
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(gradient))


def test_weights_of_the_terms():
    def loss(**settings):
        return Sundae(**settings).loss(tiny.TableModel(jnp.asarray(TABLE)), BATCH, jax.random.key(0))

    plain = loss()
    assert loss(weights=(1.0, 0.0)).loss.mean() == loss(num_unrolls=0).loss.mean() == plain.metrics["loss_1"].mean()
    np.testing.assert_allclose(loss(weights=(0.0, 3.0)).loss.mean(), 3 * plain.metrics["loss_2"].mean(), rtol=1e-6)


def test_a_warm_unroll_samples_from_the_softmax():
    rows, length = 400, 30
    batch = tiny.one_a_row([([], [5] * length)] * rows)
    logits = np.zeros((32, 32), np.float32)
    logits[:, 7:10], logits[:, 3] = [2.0, 1.0, 0.0], 3.0

    @jax.jit
    def unrolled(key):
        model = tiny.TableModel(jnp.asarray(logits))
        Sundae(num_unrolls=2, temperature=2.0).loss(model, batch, key)
        return [tokens for tokens, *_ in model.calls[1:]]

    expected = np.where(np.arange(32) < 23, np.exp(logits[0] / 2.0), 0)
    expected /= expected.sum()
    first, second = map(np.asarray, unrolled(jax.random.key(0)))
    for tokens in (first, second):
        share = np.bincount(tokens.reshape(-1), minlength=32) / tokens.size
        assert (np.abs(share - expected) <= 5 * np.sqrt(expected / tokens.size)).all()
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
