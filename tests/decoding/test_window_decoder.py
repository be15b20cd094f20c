"""Windows over a stale cache: against the same without a cache, and against a loop over one row at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import quick

from diffusion_t5x.decoding.canvas import Canvas
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.decoding.windows import WindowDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.reading import start_first
from diffusion_t5x.models.streams import row_keys, stream

MASK = tiny.VOCABULARY.mask_id
SIZES = [(2, 9), (6, 7), (0, 8), (4, 3), (1, 1), (0, 0)]  # the last is a filler row
CONFIGS = {
    "relative": tiny.RELATIVE,
    "llama": tiny.LLAMA,
    "shifted": dataclasses.replace(tiny.LLAMA, shifted=True),
    "shifted without a start": dataclasses.replace(tiny.LLAMA, shifted=True, reads_start=False),
    "encoder_decoder": tiny.ENCODER_DECODER,
}
INNER = {
    "steps": {"num_steps": 3},
    "threshold": {"num_steps": None, "threshold": 0.3, "threshold_included": True},
    "guided": {"num_steps": 2, "guidance": 0.7},
}


@functools.cache
def make_model(name):
    return tiny.make_model(CONFIGS[name])


def make_batch(name, holes=False):
    examples = tiny.random_examples(0, SIZES)
    if name == "encoder_decoder":
        return tiny.pack_apart([[example] for example in examples], 6, 9)
    if name == "shifted without a start":  # over nothing but MASK, all rotary positions have the same logits
        examples[2] = tiny.random_examples(2, [(1, 8)])[0]
    batch = tiny.one_a_row(examples, 13, first_id=5)
    if holes:
        batch = batch.replace(
            target_mask=(np.random.default_rng(1).random(batch.tokens.shape) < 0.6) & (batch.segment_ids > 0)
        )
    return batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(definition, decoder, params, batch):
    return decoder.decode(definition.bind(params), batch, jax.random.key(0), trace=True)


def decode(name, decoder, batch):
    definition, params = make_model(name)
    return jax.device_get(run(definition, decoder, params, batch))


EVERY, BY_DRIFT = {"refresh_every": 1}, {"refresh_drift": 0.0, "cached": "prefix"}
QUICK = [
    ("relative", "steps", False, BY_DRIFT),
    ("llama", "steps", False, EVERY),
    ("shifted without a start", "steps", False, EVERY),
    ("llama", "threshold", True, EVERY),
]
CASES = [
    *QUICK,
    ("relative", "steps", False, EVERY),
    ("shifted", "steps", False, BY_DRIFT),
    ("encoder_decoder", "steps", False, BY_DRIFT),
    ("llama", "threshold", True, BY_DRIFT),
    ("llama", "guided", False, BY_DRIFT),
    ("encoder_decoder", "guided", False, EVERY),
]


@pytest.mark.parametrize(("name", "inner", "holes", "how"), quick(CASES, QUICK), ids=str)
def test_reading_whole_rows_at_every_step_is_decoding_without_a_cache(name, inner, holes, how):
    batch = make_batch(name, holes)
    expected = decode(name, MaskedDecoder(window=4, **INNER[inner]), batch)
    found = decode(name, WindowDecoder(4, MaskedDecoder(**INNER[inner]), **how), batch)
    for field in ("tokens", "canvas", "written_at", "row_steps", "num_tokens"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    np.testing.assert_array_equal(found.trace.tokens[-1], found.canvas)
    confidences = (x.trace.confidence[-1] for x in (found, expected))
    np.testing.assert_allclose(*confidences, rtol=1e-3, atol=1e-6)


@functools.cache
def passes(name, inner):
    """The jitted passes over consecutive slots, and steps."""
    definition, _ = make_model(name)

    @jax.jit
    def extend(params, tokens, cache, start):
        return definition.bind(params).extend(tokens, BIDIRECTIONAL, cache, start)

    @jax.jit
    def write(params, hidden, canvas, eligible, positions, keys):
        step_keys = fold_in(stream(keys, "steps"), canvas.step[:, 0])
        written = inner.write(definition.bind(params), hidden, canvas, eligible, positions, step_keys)
        return canvas.after(written, jnp.any(eligible, axis=-1))

    return extend, write


class OneRow:
    """A row alone, without padding and with consecutive slots, and what is known of it from earlier passes."""

    def __init__(self, name, batch, row, decoder):
        self.definition, self.params = make_model(name)
        self.decoder, (self.pass_over, self.write) = decoder, passes(name, decoder.inner)
        length = int((batch.segment_ids[row] > 0).sum())
        self.batch = jax.tree.map(lambda x: x[row : row + 1, :length] if x.ndim > 1 else x[row : row + 1], batch)
        self.cache = KVCache.empty(self.definition.config, Slots.of(self.batch))
        self.hidden = self.seen = np.zeros((1, length, self.definition.config.embed_dim), np.float32)
        self.read, self.whole_passes = None, 0

    def extend(self, canvas, start, end):
        tokens = start_first(canvas, self.batch.positions, self.definition.vocabulary)[:, start:end]
        hidden, self.cache = self.pass_over(self.params, tokens, self.cache, jnp.full(1, start, jnp.int32))
        self.hidden = self.hidden.copy()
        self.hidden[:, start:end] = hidden

    def whole(self, canvas):
        self.extend(canvas, 0, canvas.shape[1])
        self.read, self.seen, self.whole_passes = canvas.copy(), self.hidden, self.whole_passes + 1

    def drift(self, canvas, window):
        same = [place for place in window if canvas[0, place] == self.read[0, place]]
        now, then = self.hidden[0, same], self.seen[0, same]
        cosine = (now * then).sum(-1) / np.linalg.norm(now, axis=-1) / np.linalg.norm(then, axis=-1)
        return np.mean(1 - cosine) if same else 0.0

    def decode(self):
        decoder, canvas = self.decoder, np.where(self.batch.target_mask, MASK, self.batch.tokens)
        keys = row_keys(jax.random.key(0), self.batch.example_ids)
        targets = np.flatnonzero(self.batch.target_mask[0])
        for number in range(0, len(targets), decoder.window):
            window = targets[number : number + decoder.window]
            written = Canvas.start(jnp.asarray(canvas), jnp.isin(jnp.arange(canvas.shape[1]), window)[None])
            while (eligible := written.target_mask & (written.tokens == MASK)).any():
                canvas = np.asarray(written.tokens)
                if int(written.step[0, 0]) % (decoder.refresh_every or 99) == 0:
                    self.whole(canvas)
                else:
                    self.extend(canvas, window[0], window[-1] + 1 if decoder.cached == "dual" else canvas.shape[1])
                    if decoder.refresh_drift is not None and self.drift(canvas, window) >= decoder.refresh_drift:
                        self.whole(canvas)
                positions = jnp.asarray(self.batch.positions)
                written = self.write(self.params, jnp.asarray(self.hidden), written, eligible, positions, keys)
            canvas = np.asarray(written.tokens)
        return canvas[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("relative", {"cached": "dual"}, marks=pytest.mark.slow),
        ("llama", {"cached": "dual", "refresh_every": 2}),
        pytest.param("llama", {"cached": "prefix"}, marks=pytest.mark.slow),
        pytest.param("llama", {"cached": "prefix", "refresh_drift": 0.02}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_batch_is_written_as_each_row_alone(name, settings):
    """Among them one without inputs, one shorter than a window, and one whose windows are not full."""
    inner = MaskedDecoder(num_steps=None, temperature=1.0, order="random")  # so that texts differ by what is drawn
    sizes = [(2, 9), (0, 11), (10, 1)]
    decoder, batch = WindowDecoder(4, inner, **settings), tiny.one_a_row(tiny.random_examples(0, sizes), 13)
    decoded = decode(name, decoder, batch)
    whole_passes = 0
    for row in range(len(sizes)):
        alone = OneRow(name, batch, row, decoder)
        np.testing.assert_array_equal(decoded.canvas[row, :11], alone.decode())
        whole_passes += alone.whole_passes
    if "refresh_drift" in settings:  # now and then
        assert 7 < whole_passes < decoded.row_steps.sum()


@pytest.mark.slow
def test_a_stale_cache_is_not_exact():
    batch, inner = make_batch("llama"), MaskedDecoder(num_steps=3)
    exact = decode("llama", WindowDecoder(4, inner, refresh_every=1), batch)
    for cached in ("prefix", "dual"):
        found = decode("llama", WindowDecoder(4, inner, cached), batch)
        assert (found.trace.confidence[-1] != exact.trace.confidence[-1]).any()
        np.testing.assert_array_equal(found.row_steps, exact.row_steps)


def test_the_first_target_of_a_window_is_written_alone():
    batch = make_batch("llama")
    decoded = decode("llama", WindowDecoder(4, MaskedDecoder(2), first_alone=True), batch)
    assert decoded.written_at[0][batch.target_mask[0]].tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 4]


@pytest.mark.slow
def test_in_bfloat16():
    definition, params = tiny.make_model(dataclasses.replace(tiny.LLAMA, dtype="bfloat16"))
    batch = make_batch("llama")
    for cached in ("prefix", "dual"):
        decoder = WindowDecoder(4, MaskedDecoder(2), cached, refresh_drift=0.01)
        decoded = jax.device_get(run(definition, decoder, params, batch))
        assert (decoded.canvas[batch.target_mask] != MASK).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowDecoder(0), "window must be at least 1; got 0"),
        (lambda: WindowDecoder(cached="suffix"), "cached must be one of prefix, dual, not 'suffix'"),
        (lambda: WindowDecoder(refresh_every=0), "refresh_every must be at least 1, or None; got 0"),
        (lambda: WindowDecoder(refresh_drift=3.0), "refresh_drift must lie in .0, 2., or be None; got 3.0"),
        (lambda: WindowDecoder(inner=SundaeDecoder()), "inner must have num_samples = 1"),
        (
            lambda: WindowDecoder(inner=SundaeDecoder(num_samples=1), first_alone=True),
            "first_alone must be False for an inner decoder that rewrites tokens",
        ),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_guidance_of_capped_logits_is_refused():
    definition, params = tiny.make_model(dataclasses.replace(tiny.LLAMA, logits_softcap=30.0))
    with pytest.raises(UserError, match=r"guidance must be 0 for a model with ModelConfig.logits_softcap"):
        WindowDecoder(4, MaskedDecoder(guidance=1.0)).decode(
            definition.bind(params), make_batch("llama"), jax.random.key(0)
        )
