"""Distillation and its SFT baseline: losses against brute force, logits as decoded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from plain_decoding import start_ahead
from plain_divergences import plain, softmax
from whole_rollouts import make_rollout_step

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import CAUSAL, AttentionKind, Slots
from diffusion_t5x.models.reading import Reading, start_first
from diffusion_t5x.models.sampling import Sampling
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.block_sft import BlockSft
from diffusion_t5x.objectives.blocks import block_starts, noisy_output
from diffusion_t5x.objectives.distillation import Distillation, visited_states

VOCABULARY = tiny.VOCABULARY
MASK, EOS = VOCABULARY.mask_id, VOCABULARY.eos_id
SHIFTED = dataclasses.replace(tiny.LLAMA, shifted=True)


LOGITS = np.random.default_rng(0).normal(0, 3, (2, 5, 7, 12)).astype(np.float32)


# Two rows, of two inputs and six targets, and of none and five; an EOS in the first.
BATCH = tiny.one_a_row([([3, 4], [5, 6, 7, 8, EOS, 10]), ([], [11, 12, 13, 14, 15])]).replace(
    written_at=np.array([[-1, -1, 0, 1, 1, 3, 2, 0], [1, 0, 0, 0, 0, -1, -1, -1]], np.int32)
)
visited = jax.jit(visited_states, static_argnums=(1, 2, 4))  # else every operation is compiled alone


def models(config=tiny.LLAMA):
    definition, student = tiny.make_model(config)
    return definition, student, tiny.random_params(definition, 1)


@functools.partial(jax.jit, static_argnums=(0, 4))  # else every operation is compiled alone, for every length
def logits_of(definition, params, tokens, slots, kind):
    model = definition.bind(params)
    return model.logits(model(tokens, slots, kind).hidden)


def forward(definition, params, tokens, slots, kind, softmax="allowed"):
    """Log-probabilities up to a constant, of a pass over these tokens alone."""
    logits = np.asarray(logits_of(definition, params, tokens, slots, kind))
    return logits if softmax == "all" else np.where(np.arange(32) < MASK, logits, -np.inf)  # MASK is the last id


@functools.cache
def brute_force_parts():
    """The teacher's log-probabilities by a pass over each prefix alone."""
    definition, _, teacher = models()
    whole = np.zeros((*BATCH.tokens.shape, 32))
    for row, length in ((0, 8), (1, 5)):
        for i in range(length):
            read = np.array([[VOCABULARY.start_id, *BATCH.tokens[row, :i]]], np.int32)
            ones, positions = np.ones_like(read), np.arange(i + 1, dtype=np.int32)[None]
            slots = Slots(segment_ids=ones, positions=positions, is_input=ones > 0)
            whole[row, i] = forward(definition, teacher, read, slots, CAUSAL)[0, -1]
    return whole


def student_logits(noisy, size, config, origin, softmax):
    """The student's logits, by one pass per block: all before it clean, nothing behind it."""
    definition, student, _ = models(config)
    logits = np.zeros((*noisy.shape, 32))
    for row, first, length in ((0, 2, 8), (1, 0, 5)):
        for start in range(first if origin == "targets" else first - first % size, length, size):
            end = min(start + size, length)
            tokens = np.concatenate([BATCH.tokens[row, :start], noisy[row, start:end]])[None]
            part = jax.tree.map(lambda x, end=end: x[:, :end] if x.ndim > 1 else x, tiny.rows_of(BATCH, [row]))
            slots = Slots.of(part)
            read = start_first(tokens, slots.positions, VOCABULARY)
            if config.shifted:
                slots, read = start_ahead(part, tokens, VOCABULARY)
            kind = AttentionKind("block_causal", size, origin)
            logits[row, start:end] = forward(definition, student, read, slots, kind, softmax)[0, start:end]
    return logits


@pytest.mark.parametrize(
    "kind,top_k,score_end,softmax,size,config,origin",
    [
        ("forward_kl", None, False, "allowed", 3, tiny.LLAMA, "targets"),
        ("forward_kl", 3, True, "allowed", 3, tiny.LLAMA, "targets"),
        ("jsd", None, True, "allowed", 3, tiny.LLAMA, "targets"),
        pytest.param("forward_kl", None, False, "all", 3, tiny.LLAMA, "targets", marks=pytest.mark.slow),
        pytest.param("forward_kl", 3, True, "allowed", 2, tiny.LLAMA, "targets", marks=pytest.mark.slow),
        pytest.param("jsd", None, True, "allowed", 3, SHIFTED, "targets", marks=pytest.mark.slow),
        ("forward_kl", None, True, "all", 3, SHIFTED, "targets"),
        ("forward_kl", 3, False, "allowed", 3, tiny.LLAMA, "row"),
    ],
)
def test_the_loss_is_what_brute_force_gives(kind, top_k, score_end, softmax, size, config, origin):
    """Two blocks and more, borders included; averaged over a text's masked targets, then over texts."""
    definition, student, teacher = models(config)
    objective = Distillation(size, kind, top_k, score_end=score_end, blocks_from=origin, softmax=softmax)
    key = jax.random.key(4)
    sums = jax.jit(
        lambda student, teacher: objective.loss(
            definition.bind(student), BATCH, key, train=False, teacher=definition.bind(teacher)
        )
    )(student, teacher)
    noisy = np.asarray(visited(BATCH, VOCABULARY, size, stream(key, "noise"), origin))
    distance = plain(brute_force_parts(), student_logits(noisy, size, config, origin, softmax), kind, top_k)
    means, ends = [], 7 if score_end else 6
    for row, end in ((0, ends), (1, 5)):
        masked = [i for i in range(end) if BATCH.target_mask[row, i] and noisy[row, i] == MASK]
        if masked:
            means.append(np.mean(distance[row, masked]))
    assert len(means) == 2
    assert sums.loss.mean() == pytest.approx(np.mean(means), rel=2e-5)


def sums_of(objective, config=tiny.LLAMA, batch=BATCH, seed=4):
    """The objective's loss of the student, and the noisy tokens."""
    definition, student, teacher = models(config)

    @jax.jit
    def run(student, teacher):
        key = jax.random.key(seed)
        loss = objective.loss(definition.bind(student), batch, key, train=False, teacher=definition.bind(teacher))
        return loss, objective.noisy(VOCABULARY, batch, key)

    return jax.device_get(run(student, teacher))


def scored_parts(noisy, score_end=False):
    """The masked targets of each row that count: up to its end, the EOS in place 6 of the first row."""
    ends = (7 if score_end else 6, 5)
    return [
        [i for i in range(end) if BATCH.target_mask[row, i] and noisy[row, i] == MASK] for row, end in enumerate(ends)
    ]


def test_the_teachers_distribution_may_be_the_one_it_would_sample_from():
    """Temperature, then top-p, then min-p, by NumPy in float64; what they exclude adds nothing."""
    sampling = Sampling(temperature=0.7, top_p=0.9, min_p=0.05)
    sums, noisy = sums_of(Distillation(3, teacher_sampling=sampling))
    p = softmax(brute_force_parts()[..., :MASK] / 0.7)
    order = np.argsort(-p, axis=-1)
    ordered = np.take_along_axis(p, order, axis=-1)
    nucleus = np.zeros(p.shape, bool)
    np.put_along_axis(nucleus, order, ordered.cumsum(axis=-1) - ordered < 0.9, axis=-1)
    kept = np.where(nucleus, p, 0) / np.where(nucleus, p, 0).sum(axis=-1, keepdims=True)
    kept = np.where(kept >= 0.05 * kept.max(axis=-1, keepdims=True), kept, 0)
    assert ((kept > 0).sum(axis=-1) < nucleus.sum(axis=-1)).any()  # min-p takes away more
    with np.errstate(divide="ignore"):
        distance = plain(
            np.log(kept / kept.sum(axis=-1, keepdims=True)),
            student_logits(noisy, 3, tiny.LLAMA, "targets", "allowed")[..., :MASK],
            "forward_kl",
        )
    means = [distance[row, masked].mean() for row, masked in enumerate(scored_parts(noisy))]
    assert sums.loss.mean() == pytest.approx(np.mean(means), rel=2e-5)


@pytest.mark.parametrize("config", [tiny.LLAMA, SHIFTED])
def test_the_teacher_may_read_the_students_most_likely_tokens(config):
    """Against a pass over each prefix alone: clean before the block, inside it what the student sees or would write."""
    sums, noisy = sums_of(Distillation(3, teacher_fill="argmax"), config)
    logits = student_logits(noisy, 3, config, "targets", "allowed")
    filled = np.where(noisy == MASK, logits.argmax(axis=-1), noisy)
    assert (filled != BATCH.tokens)[BATCH.target_mask].any()
    definition, _, teacher = models()
    means = []
    for row, masked in enumerate(scored_parts(noisy)):
        first, distances = (2, 0)[row], []
        for i in masked:
            start = i - (i - first) % 3
            read = np.array([[VOCABULARY.start_id, *BATCH.tokens[row, :start], *filled[row, start:i]]], np.int32)
            ones, positions = np.ones_like(read), np.arange(i + 1, dtype=np.int32)[None]
            slots = Slots(segment_ids=ones, positions=positions, is_input=ones > 0)
            taught = forward(definition, teacher, read, slots, CAUSAL)[0, -1]
            distances.append(plain(taught, logits[row, i], "forward_kl"))
        means.append(np.mean(distances))
    assert sums.loss.mean() == pytest.approx(np.mean(means), rel=5e-5)


def test_a_text_without_a_scored_token_counts_as_zero():
    """Its only token is EOS, which does not count: the mean over two texts is half that of the other."""
    empty = tiny.one_a_row([([3, 4], [EOS, 6, 7]), ([3, 4], [5, 6, 7])])
    empty = empty.replace(written_at=np.array([[-1, -1, 0, 0, 0]] * 2, np.int32))
    both, _ = sums_of(Distillation(3), batch=empty)
    alone, _ = sums_of(Distillation(3), batch=tiny.rows_of(empty, [1]))
    assert both.loss.denominator == 2 and alone.loss.denominator == 1
    assert both.loss.mean() == pytest.approx(float(alone.loss.mean()) / 2, rel=1e-5)
    with_end, _ = sums_of(Distillation(3, score_end=True), batch=empty)
    assert with_end.loss.mean() > both.loss.mean()


@pytest.mark.parametrize(
    "score_end,mask_probability,config,origin",
    [
        (False, 0.5, tiny.LLAMA, "targets"),
        (True, None, tiny.LLAMA, "targets"),
        (True, 0.5, SHIFTED, "targets"),
        (False, None, SHIFTED, "targets"),
        (False, 0.5, tiny.LLAMA, "row"),
        (True, None, tiny.LLAMA, "row"),
    ],
)
def test_block_sft_is_the_mean_over_a_texts_masked_tokens(score_end, mask_probability, config, origin):
    """Without weights; tokens after the end, EOS (unless asked for) and padding do not count."""
    objective = BlockSft(3, mask_probability, score_end=score_end, blocks_from=origin)
    sums, noisy = sums_of(objective, config, seed=5)
    logits = student_logits(noisy, 3, config, origin, "allowed")[..., :MASK]
    means = []
    for row, masked in enumerate(scored_parts(noisy, score_end)):
        nll = -np.log(softmax(logits.astype(np.float64)))[row, masked, BATCH.tokens[row, masked]]
        means.append(nll.mean() if len(masked) else 0)
    assert sum(means) > 0
    assert sums.loss.mean() == pytest.approx(np.mean(means), rel=2e-5)


def test_block_sft_masks_tokens_with_its_probability_whatever_their_block():
    batch = tiny.one_a_row([([3], [5, 6, 7])] * 4000)
    definition, _, _ = models()
    draw = jax.jit(lambda key: BlockSft(3).model_inputs(definition, batch, key))
    drawn = np.asarray(draw(jax.random.key(0)))[:, 1:] == MASK
    np.testing.assert_allclose(drawn.mean(axis=0), 1 / 2, atol=0.032)  # four standard errors
    counts = np.bincount(drawn.sum(axis=1), minlength=4) / 4000
    np.testing.assert_allclose(counts, [1 / 8, 3 / 8, 3 / 8, 1 / 8], atol=0.031)
    with pytest.raises(UserError, match="mask_probability"):
        BlockSft(mask_probability=0.0)


def test_gradients_reach_the_student_alone_and_a_perfect_student_has_no_loss():
    definition, student, teacher = models()

    def loss(student, teacher, model=None):
        model = model or definition.bind(student)
        sums = Distillation(3).loss(model, BATCH, jax.random.key(0), train=False, teacher=definition.bind(teacher))
        return sums.loss.mean()

    to_student, to_teacher = jax.jit(jax.grad(loss, (0, 1)))(student, teacher)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(to_student))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_teacher))
    # The same logits for both, whatever is read.
    constant = tiny.TableModel(jnp.tile(jnp.asarray(LOGITS[0, 0, 0]), (24, 1)))
    constant.logits = lambda hidden: hidden
    sums = jax.jit(lambda key: Distillation(3).loss(constant, BATCH, key, train=False, teacher=constant))(
        jax.random.key(0)
    )
    assert sums.loss.mean() == 0 and sums.metrics["agreement"].mean() == 1


@dataclasses.dataclass(frozen=True)
class Recording(MaskedDecoder):
    """Notes what each step read and its logits."""

    notes: list = dataclasses.field(default_factory=list, compare=False)

    def write(self, model, hidden, canvas, eligible, positions, keys):
        jax.debug.callback(
            lambda *x: self.notes.append([np.asarray(y) for y in x]),
            canvas.step, canvas.tokens, positions, eligible, model.logits(hidden),
            ordered=True,
        )  # fmt: skip
        return super().write(model, hidden, canvas, eligible, positions, keys)


THRESHOLD = {"num_steps": None, "threshold": 0.2}


@pytest.mark.parametrize(
    "config,origin,inner",
    [
        pytest.param(tiny.LLAMA, "targets", {"num_steps": 3}, marks=pytest.mark.slow),
        (tiny.LLAMA, "targets", THRESHOLD),
        pytest.param(tiny.RELATIVE, "targets", {"num_steps": 2}, marks=pytest.mark.slow),
        (SHIFTED, "targets", THRESHOLD),
        (tiny.LLAMA, "row", {"num_steps": 2}),
    ],
)
def test_the_training_row_gives_the_logits_that_the_decoder_saw(config, origin, inner):
    """Every state of every block, those of a text that ends inside a block too, to 1e-5 of the largest logit.

    So does a pass over the whole row, prompt and all, without the cache that the decoder has.
    """
    size = 3
    vocabulary = dataclasses.replace(VOCABULARY, eos_id=17)  # a token that these models do write
    definition = ModelDefinition(config, vocabulary)
    params = tiny.random_params(definition, 3)
    decoder = BlockDecoder(size, Recording(temperature=1.0, **inner), origin)
    prompts = tiny.one_a_row(tiny.random_examples(0, [(2, 8), (5, 8), (0, 8), (3, 7), (1, 8)]))
    texts = jax.device_get(make_rollout_step(definition, decoder)(params, prompts, 0))
    jax.effects_barrier()
    assert (texts.segment_ids != prompts.segment_ids).any()  # some end early
    assert not (texts.tokens[texts.target_mask] == MASK).any()

    model = definition.bind(params)

    @jax.jit
    def passes(noisy):
        """Logits of the training row's noisy part, and of a pass over the row without a cache."""
        reading, starts = Reading.of(texts, vocabulary, config.shifted), block_starts(texts, size, origin)
        output = noisy_output(model, reading, starts, noisy, AttentionKind("block_diffusion", size, origin), None)
        return model.logits(output.hidden), model.logits(reading.output(model, noisy, decoder.attention).hidden)

    compared = 0
    for step, canvas, positions, eligible, logits in decoder.inner.notes:
        for row in np.flatnonzero(eligible.any(axis=1)):
            in_block = texts.target_mask[row, positions[row]] & (positions[row] >= positions[row][0])
            here = positions[row][in_block]
            noisy = texts.tokens.copy()
            later = texts.written_at[row, here] >= step[row]
            noisy[row, here] = np.where(later, MASK, texts.tokens[row, here])
            np.testing.assert_array_equal(noisy[row, here], canvas[row, in_block])
            for found in passes(noisy):
                np.testing.assert_allclose(
                    found[row, here], logits[row, in_block], rtol=0, atol=1e-5 * np.abs(logits).max()
                )
            compared += 1
    assert compared > 10


def test_mistakes():
    wrongs = [{"divergence": "kl"}, {"states": "seen"}, {"top_k": 0}, {"block_size": 0}, {"mix": 1.0}]
    for wrong in (*wrongs, {"teacher_fill": "none"}, {"teacher_sampling": Sampling(0.0)}):
        with pytest.raises(UserError):
            Distillation(**wrong)
