"""Masked diffusion with wrong tokens: which targets are wrong, what each pass reads, and a loss worked out by NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import quick

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.streams import stream
from diffusion_t5x.objectives.editing import Editing
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.objective import stratified

KEY, MASK = jax.random.key(0), tiny.VOCABULARY.mask_id
BATCH = tiny.pack(
    [tiny.random_examples(n, [(1 + n % 3, 5), (2, 4)]) for n in range(7)] + [tiny.random_examples(9, [(4, 8)])], 16
)
TARGETS = BATCH.target_mask
TABLE = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
TABLE[:, MASK:] = 9.0  # MASK and what is no id would come first


@functools.cache
def read_by(objective):
    """The loss sums, and the tokens that each pass reads."""

    @jax.jit
    def run():
        model = tiny.TableModel(jnp.asarray(TABLE))
        sums = objective.loss(model, jax.tree.map(jnp.asarray, BATCH), KEY)
        return sums, [tokens for tokens, *_ in model.calls]

    return jax.device_get(run())


def cross_entropies(read):
    logits = TABLE[read][..., :MASK].astype(np.float64)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, BATCH.tokens[..., None], -1)[..., 0]


@pytest.mark.slow  # two training steps
def test_without_wrong_tokens_it_is_masked_bit_for_bit():
    definition, params = tiny.make_model()

    def run(objective):
        def loss(params):
            sums = objective.loss(definition.bind(params), BATCH, KEY)
            return sums.loss.mean(), sums

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    plain, editing = run(Masked()), run(Editing(random_share=0.0, draft_weight=0.0))
    jax.tree.map(np.testing.assert_array_equal, editing, plain)


def test_each_pass_reads_wrong_tokens_in_their_places():
    sums, (first, second) = read_by(Editing(random_share=0.5, draft_weight=0.7))
    plain = jax.jit(lambda: Masked().model_inputs(tiny.make_model()[0], BATCH, KEY))()
    masked, visible = TARGETS & (plain == MASK), TARGETS & (plain != MASK)
    np.testing.assert_array_equal(first == MASK, plain == MASK)
    for tokens in (first, second):
        np.testing.assert_array_equal(tokens[~TARGETS], BATCH.tokens[~TARGETS])
    wrong = visible & (first != BATCH.tokens)
    assert np.isin(first[wrong], tiny.VOCABULARY.noise_ids()).all()
    np.testing.assert_array_equal(second[visible], first[visible])
    np.testing.assert_array_equal(second[masked], TABLE[first][..., :MASK].argmax(-1)[masked])

    likeliest = TABLE[..., :MASK].argmax(-1)
    for name, read, shown in (("random", first, visible), ("draft", second, TARGETS)):
        right, correct = shown & (read == BATCH.tokens), likeliest[read] == BATCH.tokens
        wrong = shown & ~right
        assert wrong.any() and right.any()
        assert float(sums.metrics[f"{name}_wrong"].mean()) == pytest.approx(wrong.sum() / shown.sum())
        assert float(sums.metrics[f"{name}_mended"].mean()) == pytest.approx(correct[wrong].mean())
        assert float(sums.metrics[f"{name}_kept"].mean()) == pytest.approx(correct[right].mean())


@pytest.mark.parametrize(("share", "weight"), quick([(0.5, 0.7), (0.5, 0.0), (0.0, 0.7)], [(0.5, 0.7)]))
def test_the_loss_by_hand(share, weight):
    """The masked targets over their time, the visible ones once if some are wrong, all of the second pass by weight."""
    sums, read = read_by(Editing(random_share=share, draft_weight=weight))
    time = 1 - (1 - 1e-3) * stratified(stream(KEY, "time"), BATCH.example_ids, BATCH.segment_ids)
    masked, first = TARGETS & (read[0] == MASK), cross_entropies(read[0])
    of_masked = (first / time)[masked].sum()
    of_visible = first[TARGETS & ~masked].sum() if share else 0.0
    of_drafts = cross_entropies(read[1])[TARGETS].sum() if weight else 0.0
    assert len(read) == len(Editing(draft_weight=weight).passes) == 1 + (weight > 0)
    total = of_masked + of_visible + weight * of_drafts
    assert float(sums.loss.mean()) == pytest.approx(float(total / TARGETS.sum()), rel=1e-5)
    assert ("nll_bound" in sums.metrics) == (share == 0)
    if weight:
        assert float(sums.metrics["draft_loss"].mean()) == pytest.approx(weight * of_drafts / TARGETS.sum(), rel=1e-5)


def test_a_share_of_the_visible_targets_is_replaced():
    batch = tiny.one_a_row([([7], [5] * 80)] * 400)
    read = jax.jit(lambda key: Editing(random_share=0.3).model_inputs(tiny.make_model()[0], batch, key))
    tokens = np.asarray(read(KEY))[:, 1:]
    visible = tokens != MASK
    noise = tiny.VOCABULARY.noise_ids()
    for token in noise:
        expected = 0.3 / len(noise) + 0.7 * (token == 5)
        share = (tokens[visible] == token).mean()
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / visible.sum())


@pytest.mark.slow
def test_no_gradient_flows_through_drafts_and_all_targets_learn():
    @jax.jit
    @jax.grad
    def gradient(added):
        model = tiny.TableModel(jnp.asarray(TABLE), added=added)
        return Editing(random_share=0.2, draft_temperature=1.0).loss(model, BATCH, KEY).loss.mean()

    found = np.asarray(gradient(jnp.zeros((2, *TARGETS.shape, 32))))
    assert (found[:, ~TARGETS] == 0).all() and (found[..., MASK:] == 0).all()
    assert (np.abs(found[:, TARGETS]).max(axis=-1) > 1e-4).all()


def test_the_likelihood_is_that_of_masked():
    assert Editing.log_likelihood is Masked.log_likelihood


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"random_share": 1.0}, r"random_share must lie in \[0, 1\); got 1\.0"),
        ({"draft_weight": -1.0}, r"draft_weight must not be negative; got -1\.0"),
        ({"draft_temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Editing(**wrong)
