"""Promises of every objective, the project's and the one of docs/extending.md."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny
from my_objective import MaskPredict
from variants import quick

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import CAUSAL, PREFIX
from diffusion_t5x.objectives.alignment import Aligned
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.autoregressive_policy_gradient import AutoregressivePolicyGradient
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.block_sft import BlockSft
from diffusion_t5x.objectives.distillation import Distillation, Teacher
from diffusion_t5x.objectives.drafts import Drafts
from diffusion_t5x.objectives.editing import Editing
from diffusion_t5x.objectives.joint import Joint
from diffusion_t5x.objectives.joint_drafts import JointDrafts
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.masked_policy_gradient import MaskedPolicyGradient
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.objectives.policy_gradient import PolicyGradient
from diffusion_t5x.objectives.preferences import Preferences
from diffusion_t5x.objectives.resizing import Resizing
from diffusion_t5x.objectives.sandwiched import MaskedSandwichedPolicyGradient, SandwichedPolicyGradient
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.objectives.sundae_policy_gradient import SundaePolicyGradient
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.step import loss_of, make_train_step

OBJECTIVES = {
    "autoregressive": Autoregressive(),
    "prefix": Autoregressive(prefix=True, normalize="sequences"),
    "sundae": Sundae(),
    "masked": Masked(),
    "editing": Editing(random_share=0.3),
    "resizing": Resizing(hole_share=0.7),
    "block": Block(3),
    "clipped block": Block(3, times=(0.3, 0.8)),
    "aligned": Aligned(3),
    "uniform block": Block(3, noise="uniform", weighting="uniform"),
    "joint": Joint(Masked()),
    "joint with the example": Joint(MaskPredict()),
    "distillation": Distillation(3, states="random"),
    "argmax distillation": Distillation(3, states="random", teacher_fill="argmax"),
    "block sft": BlockSft(3),
    "drafts": Drafts(3),
    "joint drafts": JointDrafts(3),
    # The default divides by the size of the batch.
    "policy gradient": PolicyGradient(3, normalize="sequences", kl_weight=0.1, entropy_weight=0.01),
    "masked sandwiched policy gradient": MaskedSandwichedPolicyGradient(draws=2, normalize="sequences"),
    "sandwiched policy gradient": SandwichedPolicyGradient(3, draws=2, normalize="sequences"),
    "preferences": Preferences(Block(3), nll_weight=0.1),
    "autoregressive policy gradient": AutoregressivePolicyGradient(normalize="sequences", kl_weight=0.1),
    "masked policy gradient": MaskedPolicyGradient(normalize="sequences", kl_weight=0.1),
    "sundae policy gradient": SundaePolicyGradient(normalize="sequences", kl_weight=0.1),
    "the example": MaskPredict(normalize="sequences"),
}
SMALL = dataclasses.replace(tiny.RELATIVE, num_layers=1)
CONFIGS = {
    "decoder_only": SMALL,
    "shifted": dataclasses.replace(SMALL, shifted=True),
    "encoder_decoder": dataclasses.replace(SMALL, architecture="encoder_decoder"),
}
CASES = [("decoder_only", name) for name in OBJECTIVES]
CASES += [
    (config, name)
    for config in ("shifted", "encoder_decoder")
    for name in ("the example", "distillation", "argmax distillation", "drafts", "aligned")
]
# Of the objectives on texts that were judged, one is enough, and of masked diffusion and distillation.
RARE = (
    "autoregressive policy gradient",
    "masked policy gradient",
    "sundae policy gradient",
    "sandwiched policy gradient",
    "masked sandwiched policy gradient",
    "preferences",
    "editing",
    "resizing",
    "argmax distillation",
)
QUICK = [
    *(case for case in CASES[: len(OBJECTIVES)] if case[1] not in RARE),
    ("shifted", "distillation"),
    ("encoder_decoder", "the example"),
]
SIZES = [(2, 5), (1, 6), (5, 3), (3, 4)]


def make_batch(config):
    examples = [[example] for example in tiny.random_examples(0, SIZES)]
    batch = tiny.pack_apart(examples, 6, 8) if config == "encoder_decoder" else tiny.pack(examples, 10)
    # As if a decoder had written every block or canvas in two steps, and a reward had judged the rows.
    log_probability = np.where(batch.target_mask, np.float32(-3), np.float32(0))
    noise = np.where(batch.target_mask, (batch.tokens + 1) % 20 + 5, batch.tokens)
    return batch.replace(
        written_at=np.where(batch.target_mask, batch.positions % 2, -1).astype(np.int32),
        written_log_probability=log_probability,
        canvases=np.stack([noise, batch.tokens], axis=1),
        canvas_log_probability=np.stack([log_probability] * 2, axis=1),
        advantage=np.linspace(-1, 1, len(batch.tokens), dtype=np.float32),
    )


def alone(batch, rows):
    """A batch of as many rows, for which the same program serves: these come first, and fillers follow them."""
    others = [row for row in range(len(batch.tokens)) if row not in rows]
    moved = tiny.rows_of(batch, [*rows, *others])

    def blank(x):
        return np.where(np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) < len(rows), x, np.zeros_like(x))

    return jax.tree.map(blank, moved).replace(example_ids=moved.example_ids)


def make_teacher(definition):
    return Teacher(definition, tiny.random_params(definition, 1))


@functools.cache
def program(config, name):
    """The jitted `batch -> (sums, inputs)` of the objective."""
    definition, params = tiny.make_model(CONFIGS[config])
    objective, teacher = OBJECTIVES[name], make_teacher(definition)

    def run(batch):
        loss = loss_of(objective, teacher, teacher.params, params)
        key = jax.random.key(0)
        return loss(definition.bind(params), batch, key, train=False), objective.model_inputs(definition, batch, key)

    return jax.jit(run)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_a_setting_that_says_what_it_needs(name):
    objective = OBJECTIVES[name]
    assert Objective in type(objective).__mro__ and objective == dataclasses.replace(objective)
    assert hash(objective) is not None and objective.normalize in ("target_tokens", "all_tokens", "sequences")
    assert objective.autoregressive == (objective.attention in (CAUSAL, PREFIX))
    teaches_itself = objective.trains_drafts
    assert (objective.needs_teacher or teaches_itself) == any(each.by_teacher for each in objective.passes)
    assert objective.takes_rollouts or not objective.needs_rollouts


@pytest.mark.parametrize(("config", "name"), quick(CASES, QUICK))
def test_rows_add_up_and_padding_is_not_read(config, name):
    batch = make_batch(config)
    sums, inputs = jax.device_get(program(config, name)(batch))
    assert np.isfinite(sums.loss.numerator) and sums.loss.denominator > 0 and inputs.shape == batch.tokens.shape
    parts = [program(config, name)(alone(batch, rows))[0] for rows in ([0, 1], [2, 3])]
    total = jax.device_get(parts[0] + parts[1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5), total, sums)
    nonsense = batch.replace(tokens=np.where(batch.segment_ids > 0, batch.tokens, 7))
    again, _ = jax.device_get(program(config, name)(nonsense))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), again, sums)


# Of other architectures a forward pass is taken above; how gradients are taken does not depend on them.
STEPS = [*(("decoder_only", name) for name in OBJECTIVES), ("shifted", "drafts"), ("encoder_decoder", "distillation")]


@pytest.mark.parametrize(("config", "name"), quick(STEPS, [case for case in STEPS if case[1] not in RARE]))
def test_a_training_step_takes_it(config, name):
    mesh, optimizer = MeshConfig().make(jax.devices()[:1]), optax.sgd(0.1)
    definition, _ = tiny.make_model(CONFIGS[config])
    abstract, state = tiny.fresh_state(mesh, definition, optimizer)
    teacher = make_teacher(definition) if OBJECTIVES[name].needs_teacher else None
    step = make_train_step(mesh, abstract, definition, OBJECTIVES[name], optimizer, seed=0, teacher=teacher)
    with jax.set_mesh(mesh):
        state, metrics = step(state, make_batch(config))
    assert metrics["bad"] == 0 and metrics["update_norm"] > 0
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(("config", "name"), quick(CASES, QUICK))
def test_a_likelihood_is_one(config, name):
    definition, params = tiny.make_model(CONFIGS[config])
    batch = make_batch(config)
    run = jax.jit(lambda key: OBJECTIVES[name].log_likelihood(definition.bind(params), batch, key, 2))
    found = jax.device_get(run(jax.random.key(0)))
    assert (found.log_likelihood < 0).all() and (found.standard_error >= 0).all()
    np.testing.assert_array_equal(found.num_tokens, [targets for _, targets in SIZES])
    if OBJECTIVES[name].autoregressive:
        np.testing.assert_array_equal(run(jax.random.key(1)).log_likelihood, found.log_likelihood)
        assert not found.standard_error.any()


def test_what_needs_a_teacher_says_so():
    definition, params = tiny.make_model(SMALL)
    with pytest.raises(UserError, match="needs a teacher"):
        Distillation(3).loss(definition.bind(params), make_batch("decoder_only"), jax.random.key(0))
    with pytest.raises(UserError, match="without a teacher"):
        Joint(Distillation(3))
    with pytest.raises(UserError, match="diffusion objective"):
        Joint(Autoregressive())


def test_the_example_masks_from_one_to_all_targets_each_number_as_often():
    batch = tiny.one_a_row([([3], [4, 5, 6, 7])] * 400)
    tokens = np.asarray(MaskPredict().corrupt(tiny.VOCABULARY, batch, jax.random.key(0)))
    counts = np.sum(tokens == tiny.VOCABULARY.mask_id, axis=1)
    assert (np.bincount(counts, minlength=5)[1:] > 90).all() and counts.min() == 1  # 100 each, evenly drawn
    assert ((tokens == batch.tokens) | (tokens == tiny.VOCABULARY.mask_id)).all() and (tokens[:, 0] == 3).all()
