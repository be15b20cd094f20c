"""Targets may lie anywhere: what whole canvases are decoded with leaves all else as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder

DECODERS = {
    "masked": MaskedDecoder(num_steps=3),
    "threshold": MaskedDecoder(num_steps=None, threshold=0.3, temperature=1.0, order="confidence"),
    "sundae": SundaeDecoder(num_steps=3, num_samples=2),
    "share": SundaeDecoder(num_steps=4, num_samples=2, update_share=0.3, stop_when_unchanged=True),
    "argmax unrolled": SundaeDecoder(4, 2, 0.0, "argmax_unrolled", 0.3, stop_when_unchanged=True),
}
ROWS, LENGTH = 3, 9
TABLE = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)


@functools.cache
def decode(name):
    decoder, model = DECODERS[name], tiny.TableModel(jnp.asarray(TABLE))
    return jax.jit(lambda batch: decoder.decode(model, batch, jax.random.key(0), trace=True))


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=50, deadline=None)
@given(
    targets=arrays.arrays(bool, (ROWS, LENGTH)),
    lengths=arrays.arrays(np.int32, ROWS, elements=st.integers(0, LENGTH)),
    tokens=arrays.arrays(np.int32, (ROWS, LENGTH), elements=st.integers(0, 23)),
)
def test_what_is_no_target_never_changes(name, targets, lengths, tokens):
    """Fixed tokens may be anything, EOS, pad and MASK too."""
    batch = tiny.one_a_row([(row[:length], []) for row, length in zip(tokens, lengths, strict=True)], LENGTH)
    batch = batch.replace(target_mask=targets & (batch.segment_ids > 0))
    decoded = jax.device_get(decode(name)(batch))
    targets, fixed = batch.target_mask, ~batch.target_mask
    for canvas in [*decoded.trace.tokens, decoded.canvas, decoded.tokens]:
        np.testing.assert_array_equal(canvas[fixed], batch.tokens[fixed])
    np.testing.assert_array_equal(decoded.trace.tokens[-1], decoded.canvas)
    assert not decoded.trace.confidence[:, fixed].any() and (decoded.written_at[fixed] == -1).all()
    np.testing.assert_array_equal(decoded.trace.confidence[-1] > 0, decoded.written_at >= 0)
    assert (decoded.canvas[targets] < tiny.VOCABULARY.mask_id).all()
    if name != "share":
        assert (decoded.written_at[targets] >= 0).all()
    assert ((decoded.row_steps > 0) == targets.any(axis=1)).all()
