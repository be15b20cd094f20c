"""What changes as training goes on: the step reaches the objective, and all steps are one program."""

import dataclasses
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
from diffusion_t5x.training.step import make_loss_step, make_train_step, step_key

BATCH = tiny.pack([tiny.random_examples(0, [(2, 7), (0, 4)]), tiny.random_examples(1, [(3, 9)])], 14)
STAGES = ((0, 1), (2, 2), (3, 4))
BLOCK = Block(4, stages=STAGES, shifted=True)


def loss_at(objective, step, **settings):
    definition, params = tiny.make_model()
    return jax.jit(lambda p, s: objective.loss(definition.bind(p), BATCH, step_key(0, step), step=s, **settings))(
        params, step
    )


@pytest.mark.parametrize(("step", "size"), [(0, 1), (1, 1), (2, 2), (3, 4), (9, 4)])
def test_the_loss_of_a_stage_is_that_of_its_block_size(step, size):
    found, expected = loss_at(BLOCK, step), loss_at(Block(size, shifted=True), step)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


@dataclasses.dataclass(frozen=True)
class Counted(Block):
    """Counts how often it is traced."""

    traced: ClassVar[list[int]] = []

    def loss(self, *args, **kwargs):
        self.traced.append(1)
        return super().loss(*args, **kwargs)


def test_a_training_steps_loss_is_that_of_its_step_and_all_are_one_program():
    mesh, optimizer = MeshConfig().make(), optax.sgd(0.0)  # parameters stay
    definition, params = tiny.make_model()
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
        evaluated = make_loss_step(mesh, definition, plain, seed=0)(params, BATCH)
        at_the_end = make_loss_step(mesh, definition, Block(4, epsilon=0.5), seed=0)(params, BATCH)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, evaluated, at_the_end)


def test_joint_training_passes_the_step_on():
    annealed, opened = Masked(anneal_steps=100), Masked()
    first, last = (loss_at(Joint(annealed), step) for step in (0, 99))
    assert first.metrics["diffusion_loss"].mean() == loss_at(annealed, 0).loss.mean()
    assert float(last.loss.mean()) == pytest.approx(float(loss_at(Joint(opened), 99).loss.mean()), rel=1e-6)
    assert float(first.loss.mean()) != pytest.approx(float(loss_at(Joint(opened), 0).loss.mean()), rel=1e-4)


@pytest.mark.parametrize("stages", [(), ((1, 4),), ((0, 2),), ((0, 2), (0, 4)), ((0, 0), (2, 4)), (0, 4), ((0, 1, 4),)])
def test_stages_begin_at_step_0_grow_and_end_with_the_block_size(stages):
    with pytest.raises(UserError, match="stages"):
        Block(4, stages=stages)
