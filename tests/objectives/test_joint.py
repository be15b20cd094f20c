"""The joint loss: two losses of the same parameters, each as it is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.data.ends import text_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, CAUSAL
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.joint import Joint
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae

KEY = jax.random.key(0)
DEFINITION = ModelDefinition(tiny.RELATIVE, tiny.VOCABULARY)
EOS = tiny.VOCABULARY.eos_id
# Canvases: text, EOS, padding; and one that has no end.
CANVASES = tiny.one_a_row([([5, 6], [7, 8, EOS, 0, 0, 0]), ([9], [10, EOS, 0, 0]), ([], [11, 12, 13, 14, 15])], 9)


@pytest.mark.parametrize(
    "diffusion",
    [
        pytest.param(Sundae(num_unrolls=0, normalize="sequences"), marks=pytest.mark.slow),
        Block(2, normalize="all_tokens"),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_it_is_the_sum_of_both_losses_over_one_denominator(diffusion):
    definition, params = tiny.make_model()
    text = CANVASES.replace(target_mask=text_of(CANVASES, tiny.VOCABULARY))
    assert text.target_mask.sum() == 3 + 2 + 5

    @jax.jit
    def losses(params):
        model, ar = definition.bind(params), Autoregressive(normalize=diffusion.normalize)
        pairs = (Joint(diffusion, 0.5), CANVASES), (diffusion, CANVASES), (ar, text)
        return [objective.loss(model, batch, KEY, train=False) for objective, batch in pairs]

    joint, alone, causal = losses(params)
    expected = alone.loss.numerator + 0.5 * causal.loss.numerator
    assert float(joint.loss.numerator) == pytest.approx(float(expected), rel=1e-5)
    assert joint.loss.denominator == alone.loss.denominator
    metrics = {**alone.metrics, "diffusion_loss": alone.loss, "ar_nll": causal.metrics["nll"]}
    metrics["ar_accuracy"] = causal.metrics["accuracy"]
    assert joint.metrics.keys() == metrics.keys()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), joint.metrics, metrics)


def test_both_passes_have_their_own_attention_and_dropout():
    model = tiny.TableModel(jnp.zeros((32, 32)))

    @jax.jit
    def dropout_keys():
        Joint(Masked()).loss(model, CANVASES, KEY)
        return [jax.random.key_data(keys) for *_, keys in model.calls]

    first, second = dropout_keys()
    assert [kind for _, _, kind, _ in model.calls] == [BIDIRECTIONAL, CAUSAL]
    assert (first != second).any(axis=-1).all()


def test_what_is_of_diffusion_is_that_of_the_diffusion_objective():
    joint, diffusion = Joint(Block(2)), Block(2)
    assert joint.attention == diffusion.attention
    inputs = [objective.model_inputs(DEFINITION, CANVASES, KEY) for objective in (joint, diffusion)]
    np.testing.assert_array_equal(*inputs)


@pytest.mark.parametrize("bad", [{"ar_weight": -1.0}, {"diffusion": Autoregressive()}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError, match=r"Joint\."):
        Joint(**{"diffusion": Masked()} | bad)
