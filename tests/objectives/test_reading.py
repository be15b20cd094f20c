"""The token that each slot predicts, against segments laid out by hand; and attention that opens little by little."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, CAUSAL, Annealed, AttentionKind, Slots
from diffusion_t5x.models.reading import Reading
from diffusion_t5x.models.readout import score
from diffusion_t5x.objectives.annealing import annealed
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.blocks import block_starts, clean_and_noisy, noisy_output
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae

VOCABULARY = tiny.VOCABULARY
START, MASK = VOCABULARY.start_id, VOCABULARY.mask_id
# Packed examples, one without inputs, and a row with padding.
EXAMPLES = [tiny.random_examples(0, [(3, 5), (0, 4), (1, 6)]), tiny.random_examples(1, [(2, 7)])]
PACKED = tiny.pack(EXAMPLES, 20)
# Over no inputs at all, attention is undefined.
APART = tiny.pack_apart([tiny.random_examples(3, [(3, 5), (2, 4), (1, 6)]), EXAMPLES[1]], 8, 20)
BATCHES = {"relative": (tiny.RELATIVE, PACKED), "llama": (tiny.LLAMA, PACKED), "apart": (tiny.ENCODER_DECODER, APART)}
TABLE = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
WRITABLE = np.where(np.arange(32) < 23, TABLE, -np.inf)


def segments(batch):
    """The row and the slots of every segment."""
    for row, ids in enumerate(batch.segment_ids):
        for segment in range(1, ids.max() + 1):
            yield row, np.flatnonzero(ids == segment)


def losses(objective, batch, shifted=True):
    """The sums of a table's losses, and the tokens of each pass."""
    model = tiny.TableModel(jnp.asarray(TABLE), shifted=shifted)

    @jax.jit
    def run():
        sums = objective.loss(model, batch, jax.random.key(0))
        return sums, [tokens for tokens, *_ in model.calls]

    return jax.device_get(run())


@functools.cache
def make_model(name, shifted=False):
    definition, params = tiny.make_model(dataclasses.replace(BATCHES[name][0], shifted=shifted))
    return definition.bind(params)


def noisy_tokens(batch):
    return np.asarray(Masked(epsilon=0.3)._corrupt(VOCABULARY, batch, jax.random.key(0))[1])


def with_start(batch, noisy):
    """Every segment alone, `(rows, slots)` of the batch, and all as a batch, the start token ahead as an input."""
    found = list(segments(batch))
    examples = []
    for row, places in found:
        is_target, tokens = batch.target_mask[row, places], noisy[row, places]
        examples.append(([START, *tokens[~is_target]], tokens[is_target]))
    alone = tiny.one_a_row(examples, 24)
    if batch.encoder_tokens is not None:
        inside = [batch.encoder_segment_ids[row] == batch.segment_ids[row, places[0]] for row, places in found]
        inputs = [batch.encoder_tokens[row, here] for (row, _), here in zip(found, inside, strict=True)]
        encoder = tiny.one_a_row([(tokens, []) for tokens in inputs], 8)
        alone = alone.replace(
            encoder_tokens=encoder.tokens,
            encoder_segment_ids=encoder.segment_ids,
            encoder_positions=encoder.positions,
        )
    return found, alone


def logits_of(name, kind):
    """The jitted logits of a batch as it stands."""
    model = make_model(name)
    return jax.jit(lambda batch: model.logits(model(batch.tokens, Slots.of(batch), kind, model.encode(batch)).hidden))


@pytest.mark.parametrize("name", BATCHES)
def test_shifted_logits_are_those_of_segments_alone_with_the_start_token_ahead(name):
    batch, model = BATCHES[name][1], make_model(name)
    noisy = noisy_tokens(batch)
    assert (noisy == MASK).any() and (noisy[batch.target_mask] != MASK).any()
    reading = Reading.of(batch, VOCABULARY, shifted=True, packed=True)
    found = jax.jit(lambda: model.logits(reading.output(model, noisy, BIDIRECTIONAL, model.encode(batch)).hidden))()
    parts, alone = with_start(batch, noisy)
    expected = logits_of(name, BIDIRECTIONAL)(alone)
    for (row, places), logits in zip(parts, expected, strict=True):
        np.testing.assert_allclose(found[row, places], logits[: len(places)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BATCHES)
def test_shifted_and_causal_it_is_the_autoregressive_model(name):
    batch, model = BATCHES[name][1], make_model(name)
    reading = Reading.of(batch, VOCABULARY, shifted=True, packed=True)
    found = jax.jit(lambda: reading.output(model, batch.tokens, CAUSAL, model.encode(batch)).hidden)()
    expected = jax.jit(lambda: Autoregressive().output(model, batch).hidden)()
    there = batch.segment_ids > 0
    np.testing.assert_allclose(found[there], expected[there], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_every_noisy_token_moves_every_prediction_of_its_segment_and_no_other(shifted):
    model = make_model("relative")
    reading = Reading.of(PACKED, VOCABULARY, shifted, packed=True)
    hidden = jax.jit(lambda tokens: reading.output(model, tokens, BIDIRECTIONAL).hidden)
    before = np.asarray(hidden(PACKED.tokens))
    for row, places in segments(PACKED):
        for place in places:
            other = PACKED.tokens.copy()
            other[row, place] = 3 + (other[row, place] - 2) % 17
            moved = np.abs(np.asarray(hidden(other)) - before).max(axis=-1) > 1e-6
            expected = np.zeros_like(moved)
            expected[row, places] = True
            np.testing.assert_array_equal(moved[PACKED.segment_ids > 0], expected[PACKED.segment_ids > 0])


def test_tokens_without_a_place_are_cut_off_and_do_not_count():
    """There is room for 1 + 32 / 16 start tokens; the row has 7 segments and no padding."""
    batch = tiny.pack([tiny.random_examples(2, [(1, 4)] * 4 + [(0, 4)] * 3)], 32)
    reading = Reading.of(batch, VOCABULARY, shifted=True, packed=True)
    assert reading.batch.tokens.shape == (1, 35)
    row = [np.append(START, batch.tokens[0, places]) for _, places in segments(batch)]
    np.testing.assert_array_equal(reading.batch.tokens[0], np.concatenate(row)[:35])
    dropped = batch.target_mask & ~reading.fits(batch).target_mask
    np.testing.assert_array_equal(np.flatnonzero(dropped), [28, 29, 30, 31])  # 39 slots were needed
    sums, _ = losses(Masked(weighting="uniform"), batch)
    assert sums.loss.denominator == batch.target_mask.sum() - 4
    assert np.isfinite(sums.loss.mean())


def test_masked_loss_is_of_the_slot_before():
    sums, [read] = losses(Masked(weighting="uniform"), PACKED)
    slot = np.asarray(Reading.of(PACKED, VOCABULARY, shifted=True, packed=True).slot)
    total, masked = 0, 0
    for row, places in segments(PACKED):
        assert read[row, slot[row, places[0]] - 1] == START
        for place in places[PACKED.target_mask[row, places]]:
            if read[row, slot[row, place]] == MASK:
                logits, masked = WRITABLE[read[row, slot[row, place] - 1]][:23].astype(np.float64), masked + 1
                total += np.log(np.exp(logits).sum()) - logits[PACKED.tokens[row, place]]
    assert masked > 5 and float(sums.metrics["mask_fraction"].numerator) == masked
    assert float(sums.loss.numerator) == pytest.approx(total, rel=1e-5)


def test_sundaes_unroll_reads_what_the_slots_before_wrote():
    _, [first, second] = losses(Sundae(), PACKED)
    slot = np.asarray(Reading.of(PACKED, VOCABULARY, shifted=True, packed=True).slot)
    for row, places in segments(PACKED):
        is_target, at = PACKED.target_mask[row, places], slot[row, places]
        np.testing.assert_array_equal(second[row, at[is_target]], WRITABLE[first[row, at[is_target] - 1]].argmax(-1))
        np.testing.assert_array_equal(second[row, at[~is_target]], PACKED.tokens[row, places[~is_target]])


@pytest.mark.parametrize(("name", "size"), [("relative", 3), ("llama", 16), ("apart", 3)])
def test_shifted_blocks_are_those_of_a_pass_for_each_block(size, name):
    """In which the block is noisy, what is before it clean, and what is behind it nonsense."""
    batch, model = BATCHES[name][1], make_model(name)
    noisy, starts = noisy_tokens(batch), np.asarray(block_starts(batch, size))
    reading = Reading.of(batch, VOCABULARY, shifted=True, packed=True)
    kind = AttentionKind("block_diffusion", size)
    read = jax.jit(lambda: model.logits(noisy_output(model, reading, starts, noisy, kind, model.encode(batch)).hidden))
    found = np.asarray(read())

    alone = logits_of(name, AttentionKind("block_causal", size))
    row, places = max(segments(batch), key=lambda segment: len(segment[1]))
    targets = places[batch.target_mask[row, places]]
    for start in np.unique(starts[row, targets]):
        block = targets[starts[row, targets] == start]
        tokens = np.where(np.arange(20) < start, batch.tokens, 21)
        tokens[row, block] = noisy[row, block]
        parts, given = with_start(batch, tokens)
        number = [part[0] == row and part[1][0] == places[0] for part in parts].index(True)
        np.testing.assert_allclose(found[row, block], alone(given)[number][block - places[0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "apart"])
def test_shifted_blocks_of_one_token_all_masked_are_the_autoregressive_loss(name):
    batch, model = BATCHES[name][1], make_model(name, shifted=True)
    objective = Block(1, epsilon=1 - 2.0**-20)
    found = jax.jit(lambda: objective.loss(model, batch, jax.random.key(0), train=False).loss.mean())()
    nll = jax.jit(lambda: score(model, Autoregressive().output(model, batch).hidden, batch.tokens)[0])()
    assert float(found) == pytest.approx(float(nll[batch.target_mask].mean()), rel=1e-5)


KINDS = {"bidirectional": BIDIRECTIONAL, "block_diffusion": AttentionKind("block_diffusion", 3)}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_edge_to_what_is_behind_is_open_with_the_probability_of_the_step(kind):
    slots = clean_and_noisy(PACKED, PACKED.tokens, kind)[1] if kind.block_size else Slots.of(PACKED)
    whole, causal = np.asarray(kind.mask(slots, slots)), np.asarray(CAUSAL.mask(slots, slots))
    behind = whole & ~causal
    assert behind.any()

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def masks(key, step):
        return annealed(kind, 10, step, key).mask(slots, slots)

    draws = 400
    for step, probability in ((0, 0.1), (4, 0.5), (9, 1.0), (99, 1.0)):
        found = np.asarray(masks(jax.random.split(jax.random.key(step), draws), step))
        assert (found[:, whole & causal]).all() and not found[:, ~whole].any()
        share = found[:, behind].mean(axis=0)
        assert np.abs(share - probability).max() <= 5 * np.sqrt(probability * (1 - probability) / draws)
        both = behind[0] & behind[1]
        np.testing.assert_array_equal(found[:, 0][:, both], found[:, 1][:, both])  # of all rows


def test_annealing_ends_and_evaluation_is_behind_its_end():
    key = jax.random.key(0)
    assert annealed(BIDIRECTIONAL, None, jnp.int32(3), key) == annealed(BIDIRECTIONAL, 10, None, key) == BIDIRECTIONAL
    stages = ((0, 2), (9, 3))
    for objective in (Masked(anneal_steps=4), Sundae(anneal_steps=4), Block(3, stages, anneal_steps=4)):

        def kinds(step):
            model = tiny.TableModel(jnp.asarray(TABLE))
            jax.eval_shape(lambda: objective.loss(model, PACKED, key, step=step))  # noqa: B023
            return [kind for _, _, kind, _ in model.calls]

        annealing = kinds(jnp.int32(1))
        assert all(isinstance(kind, Annealed) for kind in annealing)
        assert len({id(kind) for kind in annealing}) == 1  # one draw for all passes
        assert set(kinds(None)) == {KINDS["block_diffusion"] if isinstance(objective, Block) else BIDIRECTIONAL}


@pytest.mark.parametrize("objective", [Masked, Sundae, Block])
def test_no_steps_are_no_annealing(objective):
    with pytest.raises(UserError, match="anneal_steps"):
        objective(anneal_steps=0)
