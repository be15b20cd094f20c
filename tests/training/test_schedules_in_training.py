"""Changes as training goes on: the step reaches the objective, and all steps are one program."""

import dataclasses
import functools
from typing import ClassVar

import jax
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.joint import Joint
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.step import make_train_step, step_key

BATCH = tiny.pack([tiny.random_examples(0, [(2, 7), (0, 4)]), tiny.random_examples(1, [(3, 9)])], 14)
STAGES = ((0, 1), (2, 4))
BLOCK = Block(4, stages=STAGES)
SHIFTED = dataclasses.replace(tiny.RELATIVE, shifted=True)


@functools.cache
def _loss(objective, config=tiny.RELATIVE):
    definition, _ = tiny.make_model(config)
    return jax.jit(lambda p, step: objective.loss(definition.bind(p), BATCH, step_key(0, step), step=step))


def loss_at(objective, step, config=tiny.RELATIVE):
    return _loss(objective, config)(tiny.make_model()[1], step)


def test_the_loss_of_a_stage_is_that_of_its_block_size():
    for step, size in ((0, 1), (1, 1), (2, 4), (9, 4)):
        found, expected = loss_at(BLOCK, step, SHIFTED), loss_at(Block(size), step, SHIFTED)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)
    assert _loss(BLOCK, SHIFTED)._cache_size() == 1


@dataclasses.dataclass(frozen=True)
class Counted(Block):
    """Counts how often it is traced."""

    traced: ClassVar[list[int]] = []

    def loss(self, *args, **kwargs):
        self.traced.append(1)
        return super().loss(*args, **kwargs)


@pytest.mark.slow
def test_a_training_steps_loss_is_that_of_its_step_and_all_are_one_program():
    mesh, optimizer = MeshConfig().make(), optax.sgd(0.0)  # parameters stay
    definition, _ = tiny.make_model()
    objective = Counted(4, stages=STAGES, anneal_steps=6, epsilon=0.5)
    abstract, state = tiny.fresh_state(mesh, definition, optimizer)
    step = make_train_step(mesh, abstract, definition, objective, optimizer, seed=0)
    plain = Block(4, stages=STAGES, anneal_steps=6, epsilon=0.5)
    losses, expected = [], []
    with jax.set_mesh(mesh):
        for number in range(5):
            state, metrics = step(state, BATCH)
            losses.append(float(metrics["loss"]))
            expected.append(float(loss_at(plain, number).loss.mean()))
        assert len(Counted.traced) == 1
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_the_joint_loss_is_told_of_the_step():
    annealed = Masked(anneal_steps=100)
    for step in (0, 99):
        joint, alone = loss_at(Joint(annealed), step), loss_at(annealed, step)
        assert float(joint.metrics["diffusion_loss"].mean()) == pytest.approx(float(alone.loss.mean()), rel=1e-6)


@pytest.mark.parametrize("stages", [(), ((1, 4),), ((0, 2),), ((0, 2), (0, 4)), ((0, 0), (2, 4)), (0, 4), ((0, 1, 4),)])
def test_stages_begin_at_step_0_grow_and_end_with_the_block_size(stages):
    with pytest.raises(UserError, match="stages"):
        Block(4, stages=stages)
