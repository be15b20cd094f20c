"""Hidden states drawn to the autoregressive start's: by loops over single tokens, and where both models agree."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import CAUSAL, AttentionKind, Slots
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.alignment import Aligned
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.blocks import clean_and_noisy
from diffusion_t5x.performance.model_flops import forward_flops
from diffusion_t5x.performance.step_flops import step_flops

BATCH = tiny.one_a_row(tiny.random_examples(0, [(2, 6), (4, 3)]))
MASK = tiny.VOCABULARY.mask_id
NO_START = dataclasses.replace(tiny.LLAMA, shifted=True, reads_start=False)


def loss_of(objective, definition, student, teacher, batch=BATCH):
    return jax.device_get(
        jax.jit(
            lambda student, teacher: objective.loss(
                definition.bind(student), batch, jax.random.key(0), train=False, teacher=definition.bind(teacher)
            )
        )(student, teacher)
    )


def distance(x, y):
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return 1 - x @ y / np.sqrt((x @ x) * (y @ y))


@pytest.mark.slow
def test_distances_are_those_of_the_same_prediction_and_of_the_same_token():
    """In place: a pass over `[clean | noisy]`, and one of the teacher over `[start, tokens]`, token by token."""
    definition, student = tiny.make_model(tiny.LLAMA)
    teacher = tiny.random_params(definition, 1)
    objective = Aligned(3, alignment_weight=0.5)
    sums = loss_of(objective, definition, student, teacher)
    plain = loss_of(Block(3), definition, student, teacher)
    noisy = np.asarray(objective.model_inputs(definition, BATCH, jax.random.key(0)))

    kind = AttentionKind("block_diffusion", 3)
    tokens, slots = clean_and_noisy(BATCH, noisy, kind)
    hidden = np.asarray(definition.bind(student)(tokens, slots, kind).hidden)
    of_noisy, of_clean = [], []
    for row, length in enumerate((8, 7)):
        read = np.array([[tiny.VOCABULARY.start_id, *BATCH.tokens[row, : length - 1]]], np.int32)
        ones, positions = np.ones_like(read), np.arange(length, dtype=np.int32)[None]
        causal = Slots(segment_ids=ones, positions=positions, is_input=ones > 0)
        taught = np.asarray(definition.bind(teacher)(read, causal, CAUSAL).hidden)[0]
        for i in np.flatnonzero(BATCH.target_mask[row]):
            if noisy[row, i] == MASK:
                of_noisy.append(distance(hidden[row, 8 + i], taught[i]))
            if i + 1 < length:
                of_clean.append(distance(hidden[row, i], taught[i + 1]))
    assert 2 < len(of_noisy) < 9 and len(of_clean) == 7
    assert sums.metrics["noisy_distance"].mean() == pytest.approx(np.mean(of_noisy), rel=1e-4)
    assert sums.metrics["clean_distance"].mean() == pytest.approx(np.mean(of_clean), rel=1e-4)
    assert sums.loss.denominator == plain.loss.denominator == 9
    expected = plain.loss.numerator + 0.5 * (np.sum(of_noisy) + np.sum(of_clean))
    assert sums.loss.numerator == pytest.approx(expected, rel=1e-5)
    assert sums.metrics["diffusion_loss"].mean() == plain.loss.mean()


@pytest.mark.slow
@pytest.mark.parametrize("config", [dataclasses.replace(tiny.LLAMA, shifted=True), NO_START], ids=["start", "no start"])
def test_a_shifted_student_like_its_teacher_has_no_distance_in_masked_blocks_of_one(config):
    """It is the autoregressive model then, in packed rows, too: states of equal meaning are the same states."""
    definition, params = tiny.make_model(config)
    packed = tiny.pack([tiny.random_examples(0, [(3, 5), (1, 6)]), tiny.random_examples(1, [(2, 7)])], 20)
    sums = loss_of(Aligned(1, times=(1.0, 1.0)), definition, params, params, packed)
    assert sums.metrics["noisy_distance"].mean() == pytest.approx(0, abs=1e-5)
    assert sums.metrics["clean_distance"].mean() == pytest.approx(0, abs=1e-5)
    assert sums.metrics["clean_distance"].denominator == 5 + 6 + 7 - 3
    other = loss_of(Aligned(1, times=(1.0, 1.0)), definition, params, tiny.random_params(definition, 1), packed)
    assert other.metrics["noisy_distance"].mean() > 0.1 < other.metrics["clean_distance"].mean()


def test_gradients_reach_the_student_alone():
    definition, student = tiny.make_model(tiny.LLAMA)

    def aligned(student, teacher):
        models = (definition.bind(x) for x in (student, teacher))
        sums = Aligned(3).loss(next(models), BATCH, jax.random.key(0), teacher=next(models))
        return sums.metrics["noisy_distance"].mean() + sums.metrics["clean_distance"].mean()

    to_student, to_teacher = jax.jit(jax.grad(aligned, (0, 1)))(student, tiny.random_params(definition, 1))
    assert np.any(to_student["embedding"]) and not any(np.any(leaf) for leaf in jax.tree.leaves(to_teacher))


def test_it_costs_one_pass_of_the_teacher_without_logits():
    config = dataclasses.replace(tiny.LLAMA, vocab_size=32)
    more = step_flops(config, Aligned(4), 2, 16) - step_flops(config, Block(4), 2, 16)
    assert more == 2 * forward_flops(config, 16, predicted=0)


def test_mistakes():
    for wrong in ({"alignment_weight": -1.0}, {"noise": "uniform", "weighting": "uniform"}):
        with pytest.raises(UserError, match="Aligned"):
            Aligned(**wrong)
    definition, params = tiny.make_model(tiny.LLAMA)
    model = definition.bind(params)
    with pytest.raises(UserError, match="needs a teacher"):
        Aligned(3).loss(model, BATCH, jax.random.key(0))
    wide = ModelDefinition(dataclasses.replace(tiny.LLAMA, embed_dim=32), tiny.VOCABULARY)
    with pytest.raises(UserError, match="32 dimensions"):
        Aligned(3).loss(model, BATCH, jax.random.key(0), teacher=wide.bind(tiny.random_params(wide)))
