"""Loss-free balancing: selection biases that follow the loads of experts, without a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.experts import Experts
from diffusion_t5x.models.masks import CAUSAL
from diffusion_t5x.models.mixture import choose
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.lora import Lora, LoraDefinition
from diffusion_t5x.training.step import make_train_step

RATE = 0.01
EXPERTS = Experts(number=6, per_token=2, mlp_dim=5, selection_bias=True, bias_rate=RATE)
CONFIG = dataclasses.replace(tiny.LLAMA, num_layers=1, experts=EXPERTS)
# Rows of 1 to 11 targets: microbatches differ in how many tokens they have.
BATCH = tiny.pack([tiny.random_examples(0, row) for row in [[(4, 1)], [(1, 11)], [(0, 2)], [(2, 9)]]], 12)


@functools.cache
def stepping(microbatches):
    """A step that changes nothing but biases, as its learning rate is 0; and the state before it."""
    mesh, optimizer = MeshConfig().make(jax.devices()[:1]), optax.sgd(0.0)
    abstract, state = tiny.fresh_state(mesh, ModelDefinition(CONFIG, tiny.VOCABULARY), optimizer, keep_ema=True)
    definition = ModelDefinition(CONFIG, tiny.VOCABULARY)
    options = {"seed": 0, "microbatches": microbatches, "ema_decay": 0.5}
    return make_train_step(mesh, abstract, definition, Autoregressive(), optimizer, **options), state


def copy(state):
    return jax.tree.map(jnp.copy, state)  # a step takes its state


def bias_of(params):
    return np.asarray(params["decoder"]["blocks"]["mlp"]["selection_bias"])


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_bias_moves_by_the_rate_towards_the_mean_load_of_the_whole_batch(microbatches):
    _, state = stepping(1)
    definition = ModelDefinition(CONFIG, tiny.VOCABULARY)
    seen = []

    def spy(experts, scores, bias):
        chosen, factors = choose(experts, scores, bias)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), chosen)
        return chosen, factors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion_t5x.models.mixture.choose", spy)
        tokens = shift_right(BATCH.tokens, BATCH.positions, tiny.VOCABULARY.start_id)
        definition.bind(state.params)(tokens, shifted_slots(BATCH, tiny.VOCABULARY), CAUSAL)
        jax.effects_barrier()
    loads = np.bincount(seen[0][BATCH.target_mask].ravel(), minlength=6)
    expected = bias_of(state.params)[0] + np.float32(RATE) * np.sign(loads.mean() - loads).astype(np.float32)
    after, _ = stepping(microbatches)[0](copy(state), BATCH)
    np.testing.assert_array_equal(bias_of(after.params)[0], expected)
    np.testing.assert_allclose(bias_of(after.ema)[0], (bias_of(state.params)[0] + expected) / 2, rtol=1e-6)


def test_a_bad_step_moves_no_bias():
    step, state = stepping(1)
    after, metrics = step(copy(state), BATCH, loss_limit=0.0)
    assert metrics["bad"] == 1
    np.testing.assert_array_equal(bias_of(after.params), bias_of(state.params))


def test_loads_become_even_without_a_balance_loss():
    step, state = stepping(1)
    state, busiest = copy(state), []
    for _ in range(100):
        state, metrics = step(state, BATCH)
        busiest.append(float(metrics["busiest_expert"]))
    assert busiest[0] == 3  # two experts read everything
    assert np.mean(busiest[-10:]) < 1.6  # 38 choices do not divide evenly
    assert "loads" not in metrics and metrics["update_norm"] == 0


def test_training_that_leaves_the_model_as_it_is_moves_no_bias():
    lora = Lora(drafts_only=True, targets=("query",))
    with pytest.raises(UserError, match=r"but Experts\.bias_rate does: set it to 0"):
        LoraDefinition(CONFIG, tiny.VOCABULARY, lora)
