"""Drafts trained with the rest of the model: two objectives' losses in one pass, and fewer passes for a text."""

import jax
import numpy as np
import optax
import pytest
import tiny
from variants import quick

from diffusion_t5x.data.ends import text_of
from diffusion_t5x.decoding.drafts import DraftingDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.blocks import block_starts
from diffusion_t5x.objectives.drafts import Drafts
from diffusion_t5x.objectives.joint_drafts import JointDrafts
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.step import make_train_step

CONFIGS = {"relative": tiny.RELATIVE, "llama": tiny.LLAMA, "encoder_decoder": tiny.ENCODER_DECODER}
KEY = jax.random.key(0)
SIZES = [(4, 7), (0, 9), (5, 2), (1, 8)]


def make_batch(name):
    """Rows with one text or two; one of the texts ends before its canvas does."""
    examples = tiny.random_examples(3, SIZES)
    examples[0][1][3] = tiny.VOCABULARY.eos_id
    rows = [examples[:2], examples[2:]]
    return tiny.pack_apart(rows, 9, 17) if name == "encoder_decoder" else tiny.pack(rows, 20)


@pytest.mark.parametrize("name", quick(list(CONFIGS), ["relative"]))
def test_it_is_two_losses_in_one_pass(name):
    definition, params = tiny.make_model(CONFIGS[name])
    batch = make_batch(name)
    text = batch.replace(target_mask=text_of(batch, tiny.VOCABULARY))

    @jax.jit
    def losses(params):
        model = definition.bind(params)
        pairs = (JointDrafts(3, 0.5), batch), (Autoregressive(), text), (Drafts(3), batch)
        return [objective.loss(model, batch, KEY, train=False) for objective, batch in pairs]

    joint, ar, drafts = losses(params)
    assert joint.loss.denominator == ar.loss.denominator == text.target_mask.sum() < batch.target_mask.sum()
    np.testing.assert_allclose(joint.loss.numerator, ar.loss.numerator + 0.5 * drafts.loss.numerator, rtol=1e-5)
    expected = {**ar.metrics, **drafts.metrics, "divergence": drafts.loss}
    assert joint.metrics.keys() == expected.keys()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), joint.metrics, expected)


def test_blocks_begin_anywhere_in_training():
    """Six targets in blocks of two have three drafts, or two if the first block has one target."""
    batch, (definition, params) = tiny.one_a_row(tiny.random_examples(0, [(2, 6)])), tiny.make_model()

    def num_drafted(key, train):
        return JointDrafts(2).loss(definition.bind(params), batch, key, train).metrics["agreement"].denominator

    keys = jax.random.split(jax.random.key(0), 20)
    drafted = jax.jit(jax.vmap(num_drafted, (0, None)), static_argnums=1)
    assert set(drafted(keys, True).tolist()) == {2, 3} and set(drafted(keys, False).tolist()) == {3}


@pytest.mark.parametrize("ahead", range(3))
def test_a_block_s_first_target(ahead):
    batch = tiny.one_a_row(tiny.random_examples(0, [(2, 7)]))
    starts = np.asarray(block_starts(batch, 3, ahead=ahead))[0, 2:9] - 2
    np.testing.assert_array_equal(starts, [max(3 * ((place + ahead) // 3) - ahead, 0) for place in range(7)])


@pytest.mark.slow
def test_what_was_learned_by_heart_takes_the_fewest_passes():
    """Drafts are made in decoding as in training: from every place, every one of them is right."""
    config, optimizer = tiny.LLAMA, optax.adam(5e-3)
    mesh, definition = MeshConfig().make(jax.devices()[:1]), tiny.make_model(config)[0]
    texts = tiny.one_a_row(tiny.random_examples(5, [(4, 12)] * 4))
    abstract, state = tiny.fresh_state(mesh, definition, optimizer)
    step = make_train_step(mesh, abstract, definition, JointDrafts(4), optimizer, seed=0)
    with jax.set_mesh(mesh):
        for _ in range(300):
            state, metrics = step(state, texts)
    assert metrics["accuracy"] == 1 and metrics["agreement"] == 1

    for size in (4, 3):
        decode = jax.jit(lambda params, size=size: DraftingDecoder(size).decode(definition.bind(params), texts, KEY))
        found = decode(state.params)
        np.testing.assert_array_equal(found.tokens, texts.tokens)
        np.testing.assert_array_equal(found.row_steps, 1 + -(-11 // size))


@pytest.mark.parametrize("bad", [{"block_size": 1}, {"draft_weight": -1.0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError, match=r"JointDrafts\."):
        JointDrafts(**bad)
