"""Self-speculation against greedy autoregressive decoding, whatever is drafted; its drafts against whole passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_decoding import PlainDecoding, is_tie
from variants import quick

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.canvas import Written
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.models.reading import Reading

VOCABULARY = dataclasses.replace(tiny.VOCABULARY, start_id=21)  # not pad
CONFIGS = {
    "relative": tiny.RELATIVE,
    "llama": tiny.LLAMA,
    "encoder_decoder": dataclasses.replace(tiny.ENCODER_DECODER, tie_embeddings=True),
    "shifted": dataclasses.replace(tiny.RELATIVE, shifted=True),
    "no start token": dataclasses.replace(tiny.LLAMA, shifted=True, reads_start=False),
}
MOST = 6, 9  # tokens of input and of target
# Every shape is a program to compile. No targets at all is a filler row.
some_rows = st.lists(
    st.tuples(st.integers(0, MOST[0]), st.integers(0, MOST[1]), st.integers(0, 99)), min_size=4, max_size=4
)


@dataclasses.dataclass(frozen=True)
class Tells(MaskedDecoder):
    """Drafts texts that are given, `[B, L]`, in one step."""

    num_steps: int | None = 1
    texts: jax.Array | None = None

    def write(self, model, hidden, canvas, eligible, positions, keys):
        told = self.texts[jnp.arange(len(positions))[:, None], positions]
        nothing = jnp.zeros(positions.shape)
        return Written(jnp.where(eligible, told, canvas.tokens), eligible, nothing, nothing[:, 0])


# What drafts, and how large a block is. Drafts that are told are greedy decoding's with a share of wrong tokens.
DRAFTS = {
    "told": BlockDecoder(3, Tells()),
    "one step": BlockDecoder(4, MaskedDecoder(num_steps=1)),
    "sampled": BlockDecoder(5, MaskedDecoder(num_steps=2, temperature=1.0)),
    "sundae": BlockDecoder(2, SundaeDecoder(num_steps=2, num_samples=1)),
    "row": BlockDecoder(4, MaskedDecoder(num_steps=2), "row"),
}
CASES = [
    ("relative", False, "told"),
    ("shifted", False, "sampled"),
    ("no start token", False, "one step"),
    ("relative", True, "one step"),
    ("llama", False, "sampled"),
    ("encoder_decoder", False, "sundae"),
    ("llama", True, "row"),
]


def make_batch(architecture, rows):
    examples = [tiny.random_examples(seed, [size])[0] for *size, seed in rows]
    if architecture == "encoder_decoder":
        return tiny.pack_apart([[example] for example in examples], MOST[0], MOST[1])
    return tiny.one_a_row(examples, sum(MOST))


@functools.cache
def make_model(name):
    """Random, and at an end now and then: EOS is likely enough."""
    definition, params = tiny.make_model(CONFIGS[name])
    if "head" in params:
        params["head"] = params["head"].at[:, 1].multiply(2.0)
    else:
        params["embedding"] = params["embedding"].at[1].multiply(4.0)
    return dataclasses.replace(definition, vocabulary=VOCABULARY), params


@functools.cache
def steps(name, prefix, drafts):
    """The jitted greedy decoding, and what speculates with these drafts."""
    definition, _ = make_model(name)
    greedy = AutoregressiveDecoder(prefix=prefix)

    def speculate(params, batch, texts):
        draft = DRAFTS[drafts]
        if isinstance(draft.inner, Tells):
            draft = dataclasses.replace(draft, inner=Tells(texts=texts))
        decoder = SelfSpeculationDecoder(draft, prefix)
        return decoder.decode(definition.bind(params), batch, jax.random.key(0), trace=drafts == "one step")

    def decode_greedily(params, batch):
        return greedy.decode(definition.bind(params), batch, jax.random.key(0))

    return jax.jit(decode_greedily), jax.jit(speculate)


def decode(name, prefix, drafts, batch, wrong=None):
    """Outputs of greedy decoding and of speculation; the drafts are nonsense where `wrong`, bool `[B, L]`, is true."""
    _, params = make_model(name)
    greedy, speculate = steps(name, prefix, drafts)
    expected = jax.device_get(greedy(params, batch))
    texts = np.where(np.zeros_like(batch.target_mask) if wrong is None else wrong, 2, expected.canvas)
    return expected, jax.device_get(speculate(params, batch, texts))


@pytest.mark.parametrize(("name", "prefix", "drafts"), quick(CASES, [("shifted", False, "sampled")]))
def test_the_output_is_greedy_decoding_s(name, prefix, drafts):
    definition, params = make_model(name)
    ties, seen = [], []

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(some_rows, st.sampled_from([0.0, 0.3, 0.7]), st.integers(0, 99))
    def check(rows, share, seed):
        batch = make_batch(name, rows)
        wrong = np.random.default_rng(seed).random(batch.tokens.shape) < share
        expected, found = decode(name, prefix, drafts, batch, wrong)
        for row in range(len(rows)):
            if (found.canvas[row] != expected.canvas[row]).any():
                plain = PlainDecoding(
                    definition, params, AutoregressiveDecoder(prefix=prefix), tiny.rows_of(batch, [row]), 0
                )
                ties.append(is_tie(found.tokens[row], plain))
                continue
            np.testing.assert_allclose(found.scores[row], expected.scores[row], rtol=1e-4, atol=1e-5)
            assert found.num_tokens[row] == expected.num_tokens[row]
            written = expected.written_at[row] >= 0
            np.testing.assert_array_equal(found.written_at[row] >= 0, written)
            # A row's accepted drafts and its passes' own tokens are its text, and each pass says one at most.
            checks = len(np.unique(found.written_at[row][written]))
            assert found.num_accepted[row] <= found.num_drafted[row]
            assert written.sum() - checks <= found.num_accepted[row] <= written.sum()
            assert found.row_steps[row] >= 2 * checks and (checks > 0) == written.any()
            assert found.written_at[row].max(initial=-1) == found.row_steps[row] - 1
            seen.append((written.sum(), checks, (found.tokens[row][written] == 1).any(), written.sum() == rows[row][1]))

    check()
    print(f"{len(ties)} ties in {len(ties) + len(seen)} texts")
    assert len(seen) >= 40 and len(ties) <= 1
    num_written, checks, at_eos, to_the_end = np.array(seen).T
    assert num_written.sum() > checks.sum()  # some drafts are accepted
    assert at_eos.any() and (to_the_end & ~at_eos.astype(bool)).any()


def test_what_drafts_are_worth():
    """9 targets in blocks of 3. Told the truth, rounds write 3 + 1, 2 + 1 and 2; told nonsense, one token each."""
    batch = make_batch("relative", [(3, 9, 32), (3, 9, 35), (3, 9, 32), (3, 9, 35)])
    wrong = np.zeros_like(batch.target_mask)
    wrong[2:] = True
    expected, found = decode("relative", False, "told", batch, wrong)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert (expected.num_tokens == 9).all() and not (expected.tokens == 2).any()
    np.testing.assert_array_equal(found.row_steps, [2 * 3] * 2 + [2 * 9] * 2)
    np.testing.assert_array_equal(found.num_drafted, [3 + 2 + 2] * 2 + [3 * (3 + 2 + 1)] * 2)
    np.testing.assert_array_equal(found.num_accepted, [7, 7, 0, 0])
    assert found.steps == 18
    np.testing.assert_array_equal(found.written_at[0, 3:12], [1] * 4 + [3] * 3 + [5] * 2)


@pytest.mark.parametrize("name", quick(["relative", "shifted", "no start token"], ["relative"]))
def test_drafts_are_those_of_whole_passes(name):
    """The caches change nothing: a pass over the whole row says the same of every draft."""
    definition, params = make_model(name)
    batch = make_batch(name, [(2, 9, 1), (6, 9, 2), (0, 9, 3), (4, 5, 4)])
    _, found = decode(name, True, "one step", batch)
    kind = DRAFTS["one step"].attention
    reading = Reading.of(batch, definition.vocabulary, definition.config.shifted)

    @jax.jit
    def whole_pass(tokens):
        model = definition.bind(params)
        logits = model.logits(reading.output(model, tokens, kind).hidden)
        return jax.nn.softmax(logits.at[..., 23:].set(-np.inf))

    tokens, confidence = found.trace.tokens, found.trace.confidence
    compared = 0
    for step in range(0, found.steps, 2):  # drafts and checks take turns
        probabilities = np.asarray(whole_pass(tokens[step]))
        drafted = (tokens[step] == 23) & (tokens[step + 1] != 23)
        compared += drafted.sum()
        np.testing.assert_array_equal(tokens[step + 1][drafted], probabilities.argmax(-1)[drafted])
        np.testing.assert_allclose(confidence[step + 1][drafted], probabilities.max(-1)[drafted], rtol=1e-4)
        gone = drafted & (tokens[step + 2] == 23)
        assert not confidence[step + 2][gone].any()
    assert compared == found.num_drafted.sum() > 20
    kept = found.written_at >= 0
    np.testing.assert_array_equal(tokens[-1][kept], found.canvas[kept])
    said = np.log(np.where(kept, confidence[-1], 1)).sum(-1)
    np.testing.assert_allclose(said, found.scores, rtol=1e-4)


@pytest.mark.slow
def test_a_row_s_steps_are_its_own():
    """Neighbours that need more rounds, or fewer, change nothing."""
    rows = [(2, 9, 1), (6, 9, 2), (0, 9, 3), (4, 5, 4)]
    together = decode("llama", False, "sampled", make_batch("llama", rows))[1]
    for n, row in enumerate(rows):
        apart = decode(
            "llama",
            False,
            "sampled",
            make_batch("llama", [row, *[(0, 0, 0)] * 3]).replace(example_ids=np.array([n, 97, 98, 99], np.int32)),
        )[1]
        for name in ("tokens", "row_steps", "written_at", "num_drafted", "num_accepted"):
            np.testing.assert_array_equal(getattr(apart, name)[0], getattr(together, name)[n], err_msg=name)
