"""Fast-dLLM's caches: what it writes over them, id for id, with as many passes."""

import dataclasses
import functools

import gin
import jax
import numpy as np
import pytest
from published_diffusion import DATA, generation, needs_data, reference, settings, to_write

from diffusion_t5x import api
from diffusion_t5x.command_line import config
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.windows import WindowDecoder

pytest.importorskip("seqio")
pytestmark = needs_data

CASES = [
    (family, name)
    for family in ("fastdllm_llada", "fastdllm_dream")
    for name in settings(family)
    if not name.startswith("nocache")
]


@functools.cache
def load(family):
    return api.load(DATA / family)


def decoder_for(family, chosen):
    """The decoder that these published settings mean."""
    window, is_dream = chosen["block_length"], family == "fastdllm_dream"
    length = chosen["max_new_tokens" if is_dream else "gen_length"]
    if "threshold" in chosen:
        inner = MaskedDecoder(None, threshold=chosen["threshold"], threshold_included=True, softmax="all")
    elif is_dream:
        steps = chosen["steps"] // (length // window)
        inner = MaskedDecoder(steps, counts="times", order="entropy", softmax="filtered")
    else:
        inner = MaskedDecoder(chosen["steps"] // (length // window), softmax="all")
    dual = chosen.get("dual_cache", "dual" in chosen.get("function", ""))
    return WindowDecoder(window, inner, "dual" if dual else "prefix", first_alone=is_dream)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_texts_over_a_stale_cache_are_the_published_ones_id_for_id(family, name):
    opened, chosen = load(family), settings(family)[name]
    definition = opened.definition
    prompts, outputs = generation(family, name)
    batch = to_write(prompts, len(outputs[0]) - len(prompts[0]), definition.vocabulary.pad_id)
    decoder = decoder_for(family, chosen)
    decoded = jax.jit(lambda params: decoder.decode(definition.bind(params), batch, jax.random.key(0)))(opened.params)
    for row, output in zip(np.asarray(decoded.canvas), outputs, strict=True):
        np.testing.assert_array_equal(row[: len(output)], output)
    passes = reference(family)[1].get(f"gen_{name}_nfe")
    if passes is not None:
        windows = np.asarray(decoded.written_at)[batch.target_mask].reshape(len(prompts), -1, decoder.window)
        steps = np.array([[len(set(window.tolist())) for window in row] for row in windows])
        np.testing.assert_array_equal(steps.sum(axis=1), decoded.row_steps)
        # Theirs makes a second pass over a window that the first has finished.
        np.testing.assert_array_equal(np.maximum(steps, 2).sum(axis=1), passes)


def test_the_gin_files_are_these_decoders():
    for family, file in (("fastdllm_llada", "fast_dllm"), ("fastdllm_dream", "fast_dllm_dream")):
        config.load([f"decoding/published/{file}.gin"])
        name = next(name for name in settings(family) if name.startswith("dual_thr"))
        chosen = settings(family)[name] | {"threshold": 0.9, "block_length": 32}
        expected = decoder_for(family, chosen)
        if family == "fastdllm_dream":  # where nothing is filtered, all is the same
            expected = dataclasses.replace(expected, inner=dataclasses.replace(expected.inner, softmax="filtered"))
        assert gin.query_parameter("%DECODER").scoped_configurable_fn() == expected
