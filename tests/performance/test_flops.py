"""Closed forms of a step's cost against the matrix products of the program that runs."""

import dataclasses
import math

import jax
import jax.extend.core
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.masks import Slots
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.joint import Joint
from diffusion_t5x.objectives.joint_drafts import JointDrafts
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.performance.model_flops import forward_flops
from diffusion_t5x.performance.step_flops import rollout_flops, step_flops
from diffusion_t5x.training.ramps import Ramp
from diffusion_t5x.training.rollout import Rollout

KEY = jax.random.key(0)
BATCH = tiny.one_a_row(tiny.random_examples(0, [(5, 8), (3, 9), (4, 6)]), 16)
APART = tiny.pack_apart([[example] for example in tiny.random_examples(0, [(5, 8), (3, 9)])], 6, 12)


def matrix_products(jaxpr, times: int = 1) -> int:
    """Floating-point operations of all matrix products in a program without loops of unknown length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            products = math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            total += 2 * times * products
        if equation.primitive.name == "ragged_dot_general":  # each row has one of several matrices
            total += 2 * times * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1]
        assert equation.primitive.name != "while"
        loops = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += matrix_products(inner, times * loops)
    return total


def cost(function, *args) -> int:
    return matrix_products(jax.make_jaxpr(function)(*args).jaxpr)


OBJECTIVES = [Autoregressive(), Sundae(), Sundae(num_unrolls=2), Masked(), Block(4)]
OBJECTIVES += [Joint(Block(4)), Joint(Sundae()), JointDrafts(4)]


@pytest.mark.parametrize(
    ("objective", "architecture"),
    [
        *((objective, name) for name in ("llama", "encoder_decoder") for objective in OBJECTIVES),
        *((objective, name) for name in ("decoder_only", "gpt2", "experts") for objective in (Sundae(), Block(4))),
    ],
    ids=str,
)
def test_a_step_is_three_times_its_forward_passes(objective, architecture):
    configs = {"decoder_only": tiny.RELATIVE, "llama": tiny.LLAMA, "gpt2": tiny.GPT2, "experts": tiny.EXPERTS}
    config = (configs | {"encoder_decoder": tiny.ENCODER_DECODER})[architecture]
    batch, encoder_length = (APART, 6) if architecture == "encoder_decoder" else (BATCH, 0)
    definition, params = tiny.make_model(config)
    forward = cost(lambda params: objective.loss(definition.bind(params), batch, KEY, train=False), params)
    assert 3 * forward == step_flops(config, objective, *batch.tokens.shape, encoder_length)


def test_the_teacher_passes_forwards_alone():
    definition, params = tiny.make_model()
    teacher, teacher_params = tiny.make_model(dataclasses.replace(tiny.RELATIVE, num_layers=3, mlp_dim=48))

    def loss(params, teacher_params):
        teaches = teacher.bind(teacher_params)
        return Distillation().loss(definition.bind(params), BATCH, KEY, train=False, teacher=teaches)

    of_teacher = 3 * forward_flops(teacher.config, 16)
    student = cost(loss, params, teacher_params) - of_teacher
    expected = 3 * student + of_teacher
    assert expected == step_flops(definition.config, Distillation(), *BATCH.tokens.shape, teacher=teacher.config)


def test_a_backward_pass_takes_twice_its_forward_pass():
    definition, params = tiny.make_model()

    def loss(params):
        return Masked().loss(definition.bind(params), BATCH, KEY, train=False).loss.numerator

    assert cost(jax.grad(loss), params) == 3 * cost(loss, params)


def test_a_rollout_is_its_passes():
    """The FLOPs of one row are those of the prompt's pass and, per block, of its steps and one pass for the cache."""
    decoder = BlockDecoder(4, MaskedDecoder(num_steps=2))
    rollout = Rollout(decoder, num_batches=1, lengths=Ramp(6, 16, 12, "linear"), num_buckets=2)
    row, blocks = 5 + 16, 3  # at step 5: 11 targets, in a bucket of 16
    definition, params = tiny.make_model()
    batch = dataclasses.replace(tiny.one_a_row([([5] * 5, [6] * 16)], row), written_at=None)

    def passes(params):
        model = definition.bind(params)

        cache, start = KVCache.empty(model.config, Slots.of(batch)), np.zeros(1, np.int32)
        read = [model.extend(batch.tokens, decoder.attention, cache, start)[0]]
        for _ in range(blocks):
            for step in range(3):
                hidden, _ = model.extend(batch.tokens[:, 5:9], decoder.attention, cache, start + 5)
                read.append(model.logits(hidden) if step < 2 else hidden)
        return read

    assert cost(passes, params) == rollout_flops(definition.config, rollout, 1, 5, step=5)
    assert rollout_flops(definition.config, rollout, 7, 5, step=5) == 7 * rollout_flops(
        definition.config, rollout, 1, 5, step=5
    )
