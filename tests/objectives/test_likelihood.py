"""Log-likelihoods and their bounds, against sums over everything that could be drawn, for a model that is a table."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import quick

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Output
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.objectives.uniform_bound import NUM_STEPS, step_divergence

# 0 pad, 1 EOS, 2 a piece, 3 MASK; logits have a fifth id that stands for nothing. Texts follow an input, 2.
VOCABULARY = TokenIds(size=4, pad_id=0, eos_id=1, mask_id=3, start_id=3, noise_ranges=((0, 3),))
TEXTS = np.array(list(itertools.product(range(3), repeat=4)))
BATCH = tiny.one_a_row([([2], text.tolist()) for text in TEXTS])
TABLE = np.random.default_rng(0).normal(0, 1.5, (5, 5**5, 5)).astype(np.float32)


class Table(tiny.TableModel):
    """Logits are drawn anew for each position and all that is seen from there."""

    def __call__(self, tokens, slots, kind, encoded=None, dropout_keys=None):
        index = jnp.arange(tokens.shape[1]) if slots.index is None else slots.index[0]
        seen = jnp.where(kind.mask(slots, slots), (tokens[:, None] + 1) * 5 ** jnp.minimum(index, 4), 0)
        return Output(self.table[jnp.minimum(slots.positions, 4), seen.sum(-1)])


MODEL = Table(jnp.asarray(TABLE), VOCABULARY)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(objective, batch, key, num_draws):
    return objective.log_likelihood(MODEL, batch, key, num_draws)


divergence = jax.jit(step_divergence, static_argnums=(4, 5))


def log_softmax(logits):
    """In float64, of the ids that may be written."""
    logits = logits[..., :3].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def block_at(place, size, tail=0):
    """The targets that share a block with one; the first block begins with so many inputs."""
    start = (place + tail) // size * size - tail
    return range(max(start, 0), min(start + size, 4))


def log_p(text, canvas, size=None, tail=0):
    """float64 `[4, 3]`, of what stands behind a canvas, seen as in diffusion of all targets or of blocks."""
    found = []
    for place in range(4):
        block = range(4) if size is None else block_at(place, size, tail)
        before = range(block[0])
        seen = (
            3 + sum((text[p] + 1) * 5 ** (p + 1) for p in before) + sum((canvas[p] + 1) * 5 ** (p + 1) for p in block)
        )
        found.append(TABLE[place + 1, seen])
    return log_softmax(np.array(found))


def end_of(text):
    """The place of the first EOS or pad, or of the last token."""
    return next((place for place, token in enumerate(text) if token < 2), 3)


def groups_of(text, size, tail=0):
    """The places of each group of targets that a bound counts."""
    if size is None:
        return [range(4)]
    return list(dict.fromkeys(block_at(place, size, tail) for place in range(end_of(text) + 1)))


def exact_masked(text, size, tail=0):
    """The mean over l of n / l times the mean over all patterns with l masks of the masked tokens' cross-entropies."""
    total = 0
    for group in groups_of(text, size, tail):
        n = len(group)
        for number in range(1, n + 1):
            patterns = list(itertools.combinations(group, number))
            for pattern in patterns:
                canvas = [3 if place in pattern else token for place, token in enumerate(text)]
                found = log_p(text, canvas, size, tail)
                total += sum(found[p, text[p]] for p in pattern) / number / len(patterns)
    return total


def bayes(log_p, clean, noisy, step, num_steps, noise):
    """KL(q(s | z, x) || sum_x' q(s | z, x') p(x' | z)) `[...]` in float64, from nothing but the forward process."""
    size, ids = noise.sum(), np.arange(len(noise))
    s, t = (step[..., None] - 1) / num_steps, step[..., None] / num_steps
    keep = (1 - t) / np.where(s < 1, 1 - s, 1)
    back = keep * (ids == noisy[..., None]) + (1 - keep) / size * noise[noisy][..., None]  # z given s
    ahead = (1 - s[..., None]) * np.eye(len(ids)) + s[..., None] * noise / size  # s given x, [..., x, s]
    joint = ahead * back[..., None, :]
    evidence = joint.sum(-1, keepdims=True)
    q = joint / np.where(evidence > 0, evidence, 1)
    p_of = np.where(evidence[..., 0] > 0, np.exp(log_p), 0)
    p = (p_of[..., None] * q).sum(-2) / p_of.sum(-1, keepdims=True)
    q = np.take_along_axis(q, np.broadcast_to(clean[..., None, None], (*q.shape[:-2], 1, len(ids))), -2)[..., 0, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(q > 0, q * np.log(q / p), 0).sum(-1)


def exact_uniform(text, size, tail=0):
    counted = np.isin(np.arange(4), [place for group in groups_of(text, size, tail) for place in group])
    log_ps = np.array([log_p(text, canvas, size, tail) for canvas in TEXTS])  # of every canvas [81, 4, 3]
    steps = np.arange(1, NUM_STEPS + 1)[:, None, None]
    times = steps / NUM_STEPS
    chance = np.prod(times / 3 + (1 - times) * (text == TEXTS), axis=-1)  # of a canvas at each time
    clean, noisy = np.broadcast_to(text, (NUM_STEPS, 81, 4)), np.broadcast_to(TEXTS, (NUM_STEPS, 81, 4))
    divergences = bayes(log_ps, clean, noisy, np.broadcast_to(steps, clean.shape), NUM_STEPS, np.ones(3, bool))
    return -(chance * (divergences * counted).sum(-1)).sum()


UNIFORM_BLOCKS = {"noise": "uniform", "weighting": "uniform"}
BOUNDS = {
    "masked": (Masked("cosine", "uniform", 0.3), exact_masked, None),
    "block 1": (Block(1), exact_masked, 1),
    "block 2": (Block(2, weighting="uniform"), exact_masked, 2),
    "block 3": (Block(3), exact_masked, 3),
    "block 4": (Block(4), exact_masked, 4),
    "distillation": (Distillation(2), exact_masked, 2),
    "sundae": (Sundae(), exact_uniform, None),
    "uniform block 2": (Block(2, **UNIFORM_BLOCKS), exact_uniform, 2),
    # From the row's beginning, the one input shares the first target's block.
    "block 2 of the row": (Block(2, blocks_from="row"), functools.partial(exact_masked, tail=1), 2),
    "block 3 of the row": (Block(3, blocks_from="row"), functools.partial(exact_masked, tail=1), 3),
    "distillation of the row": (Distillation(2, blocks_from="row"), functools.partial(exact_masked, tail=1), 2),
    "uniform block 3 of the row": (
        Block(3, **UNIFORM_BLOCKS, blocks_from="row"), functools.partial(exact_uniform, tail=1), 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", quick(BOUNDS, ["masked", "sundae", "block 2", "distillation of the row", "uniform block 2"])
)
def test_a_bound_is_what_enumeration_gives(name):
    objective, exact, size = BOUNDS[name]
    rows = range(0, 81, 20 if "uniform" in name or name == "sundae" else 4)
    found = run(objective, BATCH, jax.random.key(0), 256)
    errors = np.array([found.log_likelihood[row] - exact(TEXTS[row], size) for row in rows])
    stated = np.asarray(found.standard_error)[list(rows)]
    if name == "block 1":
        assert (stated == 0).all()
        np.testing.assert_allclose(errors, 0, atol=1e-5)
    else:
        assert (stated > 0).any()
        assert abs(errors.sum()) < 3 * np.sqrt(np.square(stated).sum())
        # Rows with nothing to draw are exact; of the others one may be beyond 3.
        assert (np.abs(errors) < 4.5 * stated + 1e-5).all() and (np.abs(errors) > 3 * stated + 1e-5).sum() <= 1
    np.testing.assert_array_equal(found.num_tokens, [end_of(text) + 1 for text in TEXTS])


@pytest.mark.parametrize("name", ["masked", "block 2", "sundae", "uniform block 2"])
def test_the_stated_error_is_the_spread_over_keys(name):
    batch = tiny.rows_of(BATCH, [80, 26])
    keys = jax.random.split(jax.random.key(1), 400)
    found = jax.vmap(lambda key: run(BOUNDS[name][0], batch, key, 16))(keys)
    stated = np.sqrt(np.square(found.standard_error).mean(axis=0))
    np.testing.assert_allclose(stated, np.std(found.log_likelihood, axis=0, ddof=1), rtol=0.2)


@pytest.mark.parametrize("objective", [Autoregressive(), Block(1)], ids=["ar", "block 1"])
def test_exact_likelihoods_of_all_texts_sum_to_one(objective):
    """A text counts once, whatever stands behind its end."""
    found = run(objective, BATCH, jax.random.key(0), 2).log_likelihood
    once = np.array([row for row, text in enumerate(TEXTS) if not text[end_of(text) + 1 :].any()])
    assert np.exp(found[once]).sum() == pytest.approx(1, abs=1e-5)


def test_autoregressive_is_the_sum_of_log_probabilities_up_to_the_end():
    found = run(Autoregressive(), BATCH, None, 2)
    for row, text in enumerate(TEXTS):
        expected = 0.0
        for place in range(end_of(text) + 1):
            read = [3, 2, *text[:place]]  # the start token, the input, and what is before
            seen = sum((token + 1) * 5 ** min(index, 4) for index, token in enumerate(read))
            expected += log_softmax(TABLE[place + 1, seen])[text[place]]
        assert found.log_likelihood[row] == pytest.approx(expected, abs=1e-5)
    assert not found.standard_error.any()


def test_what_a_decoder_has_sampled_is_as_likely_as_it_says():
    definition, params = tiny.make_model()
    model = definition.bind(params)
    batch = tiny.one_a_row(tiny.random_examples(0, [(3, 8), (1, 8), (0, 8), (2, 5)]))
    decoded = jax.jit(lambda: AutoregressiveDecoder(temperature=1.0).decode(model, batch, jax.random.key(3)))()
    written = batch.replace(tokens=decoded.tokens)
    found = jax.jit(lambda: Autoregressive().log_likelihood(model, written, None, 2))()
    np.testing.assert_allclose(found.log_likelihood, decoded.scores, rtol=1e-5)
    np.testing.assert_array_equal(found.num_tokens, decoded.num_tokens)


def test_true_conditionals_give_the_entropy_of_masked_pairs():
    """p = [[.4, .1], [.1, .4]]: H = 1.193550; every draw of one number of masks says the same."""
    joint = np.array([[0.4, 0.1], [0.1, 0.4]])
    table = np.full((3, 3), 5.0, np.float32)  # given 0, 1 and MASK; MASK itself would be likeliest of all
    table[:, :2] = np.log([*joint / joint.sum(1, keepdims=True), joint.sum(0)])

    class Other(tiny.TableModel):
        def __call__(self, tokens, *args):
            return super().__call__(tokens[:, ::-1], *args)

    pairs = TokenIds(3, pad_id=0, eos_id=1, mask_id=2, start_id=2, noise_ranges=((0, 2),))
    batch = tiny.one_a_row([([], pair) for pair in itertools.product([0, 1], repeat=2)])
    model = Other(jnp.asarray(table), pairs)
    found = jax.jit(lambda: Masked().log_likelihood(model, batch, jax.random.key(0), 8))()
    assert -(found.log_likelihood * joint.reshape(-1)).sum() == pytest.approx(1.193550, abs=2e-6)
    assert found.standard_error.max() < 1e-6


def independent(num_steps, probabilities, noise):
    """The chance of every (step, clean token, z), and the logits of the exact posterior of independent tokens."""
    vocabulary = dataclasses.replace(
        VOCABULARY, size=len(noise) + 1, mask_id=len(noise), noise_ranges=noise_ranges(noise)
    )
    grid = np.meshgrid(np.arange(1, num_steps + 1), *[np.arange(len(noise))] * 2, indexing="ij")
    step, clean, noisy = (x.reshape(-1) for x in grid)
    t = (step / num_steps)[:, None]
    given = (1 - t) * (np.arange(len(noise)) == noisy[:, None]) + t * noise[noisy][:, None] / noise.sum()  # z given x
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities) + np.log(given)
    chance = probabilities[clean] * given[np.arange(len(step)), clean]
    possible = chance > 0
    logits = np.pad(logits, ((0, 0), (0, 1)), constant_values=9.0)[possible].astype(np.float32)
    found = divergence(logits, clean[possible], noisy[possible], step[possible], vocabulary, num_steps)
    return chance[possible], np.asarray(found, np.float64)


def noise_ranges(noise):
    return tuple((int(token), int(token) + 1) for token in np.flatnonzero(noise))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 1000])
@pytest.mark.parametrize(
    ("probabilities", "noise", "entropy"),
    [((0.5, 0.3, 0.2), (1, 1, 1), 1.029653), ((0.5, 0.2, 0.1, 0.2), (1, 1, 0, 1), 1.220607)],
    ids=["all noise", "one token is no noise"],
)
def test_exact_posteriors_give_the_entropy_at_any_number_of_steps(num_steps, probabilities, noise, entropy):
    chance, found = independent(num_steps, np.array(probabilities), np.array(noise, bool))
    assert (chance * found).sum() == pytest.approx(entropy, abs=3e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_a_step_is_what_bayes_gives(num_steps):
    """Over clean tokens in and outside the noise vocabulary, and predictions from flat to nearly certain."""
    noise = np.array([1, 0, 1, 1, 1, 0], bool)
    vocabulary = dataclasses.replace(VOCABULARY, size=7, mask_id=6, noise_ranges=noise_ranges(noise))
    rng = np.random.default_rng(1)
    steps = np.unique([1, 2, num_steps // 2 + 1, num_steps])
    grid = np.meshgrid(np.minimum(steps, num_steps), range(6), range(6), range(4), indexing="ij")
    step, clean, noisy, sharpness = (x.reshape(-1) for x in grid)
    possible = (noise[noisy] | (noisy == clean)) & ((step < num_steps) | noise[noisy])
    step, clean, noisy = step[possible], clean[possible], noisy[possible]
    logits = (rng.normal(size=(len(step), 8)) * np.array([0, 1, 4, 12])[sharpness[possible]][:, None]).astype(
        np.float32
    )
    log_p = logits[:, :6].astype(np.float64)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    found = divergence(logits, clean, noisy, step, vocabulary, num_steps)
    np.testing.assert_allclose(found, bayes(log_p, clean, noisy, step, num_steps, noise), rtol=2e-4, atol=3e-7)


OBJECTIVES = [Autoregressive(), Masked(), Block(3), Sundae(), Block(3, **UNIFORM_BLOCKS)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["ar", "masked", "block", "sundae", "uniform block"])
def test_a_row_is_the_same_alone_among_others_and_with_padding(objective):
    examples = [([2], [2, 2, 1]), ([], [2, 0, 2]), ([2, 2], [2, 2, 2]), ([2], [1, 2])]
    whole = run(objective, tiny.one_a_row([*examples, ([], [])], first_id=10), jax.random.key(0), 8)
    assert whole.num_tokens.tolist() == [3, 2, 3, 1, 0]
    assert whole.log_likelihood[4] == 0  # a row that fills up a batch
    alone = run(objective, tiny.one_a_row(examples[2:3], length=9, first_id=12), jax.random.key(0), 8)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y[2:3], rtol=1e-5, atol=1e-6), alone, whole)


@pytest.mark.parametrize("objective", [Masked(), Sundae()], ids=["masked", "sundae"])
def test_a_large_vocabulary_is_read_out_in_pieces(objective, monkeypatch):
    definition, params = tiny.make_model()
    batch = tiny.one_a_row(tiny.random_examples(5, [(2, 6), (0, 5)]))

    def log_likelihood():
        jitted = jax.jit(lambda: objective.log_likelihood(definition.bind(params), batch, jax.random.key(0), 4))
        return jitted().log_likelihood

    whole = log_likelihood()
    monkeypatch.setattr("diffusion_t5x.models.transformer.MAX_LOGITS", 2 * 3 * 32)
    np.testing.assert_allclose(log_likelihood(), whole, rtol=1e-5)


@pytest.mark.parametrize("num_draws", [0, 1, 7])
def test_draws_come_in_pairs(num_draws):
    with pytest.raises(UserError, match="even number"):
        Masked().log_likelihood(MODEL, BATCH, jax.random.key(0), num_draws)
