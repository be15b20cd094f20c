"""Decoders that are watched at work: they write what they write unwatched, and show what a trace keeps."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.partitioning import MeshConfig

MESH = MeshConfig(data=1).make(jax.devices()[:1])
ROWS = [[example] for example in tiny.random_examples(0, [(3, 9), (5, 7)])]


def compiled(decoder, batch, trace, config=tiny.RELATIVE):
    definition, params = tiny.make_model(config)
    program = make_decode_step(MESH, definition, decoder, seed=0, trace=trace)
    return program.lower(params, batch, np.int32(0)).compile(), params


@pytest.mark.parametrize(
    "decoder,config",
    [
        pytest.param(AutoregressiveDecoder(temperature=1.0), tiny.RELATIVE, marks=pytest.mark.slow),
        pytest.param(AutoregressiveDecoder(), tiny.ENCODER_DECODER, marks=pytest.mark.slow),
        pytest.param(BeamSearchDecoder(num_beams=2), tiny.RELATIVE, marks=pytest.mark.slow),
        pytest.param(SundaeDecoder(num_steps=4, num_samples=3), tiny.RELATIVE, marks=pytest.mark.slow),
        pytest.param(MaskedDecoder(num_steps=3), tiny.RELATIVE, marks=pytest.mark.slow),
        (BlockDecoder(4, MaskedDecoder(num_steps=2)), dataclasses.replace(tiny.RELATIVE, shifted=True)),
        pytest.param(BlockDecoder(4, SundaeDecoder(2, 1)), tiny.RELATIVE, marks=pytest.mark.slow),
        pytest.param(SelfSpeculationDecoder(), tiny.RELATIVE, marks=pytest.mark.slow),
    ],
    ids=[
        "autoregressive",
        "encoder_decoder",
        "beams",
        "sundae",
        "masked",
        "block",
        "uniform block",
        "self_speculation",
    ],
)
def test_watched_it_writes_the_same_and_shows_every_step(decoder, config):
    batch = tiny.pack_apart(ROWS, 5, 9) if config is tiny.ENCODER_DECODER else tiny.pack(ROWS, 13)
    seen = {}

    def watch(step, tokens, confidence):
        assert int(step) not in seen
        seen[int(step)] = np.array(tokens), np.array(confidence)

    programs = [compiled(decoder, batch, trace, config) for trace in (False, True, watch)]
    assert ["callback" in program.as_text() for program, _ in programs] == [False, False, True]
    plain, traced, watched = (
        jax.block_until_ready(program(params, batch, np.int32(0))) for program, params in programs
    )
    jax.tree.map(np.testing.assert_array_equal, plain, watched)
    assert watched.trace is None and plain.steps > 1 and sorted(seen) == list(range(int(plain.steps) + 1))
    for step, (tokens, confidence) in seen.items():
        tokens, confidence = (x.reshape(len(ROWS), -1, x.shape[-1]) for x in (tokens, confidence))
        for row in range(len(ROWS)):  # of several canvases a trace keeps the one that was the best in the end
            kept = [
                number
                for number, canvas in enumerate(seen[0][0].reshape(tokens.shape)[row])
                if np.array_equal(canvas, traced.trace.tokens[0, row])
            ]
            np.testing.assert_array_equal(tokens[row, kept[0]], traced.trace.tokens[step, row])
            np.testing.assert_allclose(confidence[row, kept[0]], traced.trace.confidence[step, row], rtol=1e-5)


def test_an_exception_of_the_watch_ends_the_decoding():
    batch, seen = tiny.one_a_row(tiny.random_examples(0, [(3, 200)])), []

    def watch(step, tokens, confidence):
        seen.append(int(step))
        if step == 3:
            raise RuntimeError("enough")

    program, params = compiled(SundaeDecoder(num_steps=50, num_samples=1), batch, watch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="enough"):
        jax.block_until_ready(program(params, batch, np.int32(0)))
    assert seen == [0, 1, 2, 3]
