"""A rollout in slots beside one whole batch, in turns; `-s` prints the figures."""

import dataclasses
import statistics
import time

import jax
import numpy as np
import pytest
import tiny
from whole_rollouts import make_rollout_step

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.rollout_texts import TextWriter, prompts

BATCHES, ROWS, LENGTH, TURNS = 8, 8, 64, 3


@pytest.mark.slow
def test_slots_write_unequal_texts_in_less_time():
    """The model of the quickstart's size, untrained: one of its 20 tokens ends a text."""
    sizes = {"embed_dim": 96, "num_layers": 2, "num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "mlp_dim": 256}
    vocabulary = dataclasses.replace(tiny.VOCABULARY, eos_id=17)
    definition = ModelDefinition(dataclasses.replace(tiny.LLAMA, **sizes), vocabulary)
    params, mesh = tiny.random_params(definition, 0), MeshConfig().make(jax.devices()[:1])
    decoder = BlockDecoder(4, MaskedDecoder(num_steps=4, order="random", temperature=1.0))
    data = tiny.one_a_row(tiny.random_examples(0, [(16, 1)] * BATCHES * ROWS), length=17)
    asked, whole = prompts(data, 16, LENGTH, LENGTH), make_rollout_step(definition, decoder)
    ways = {"one batch": lambda step: jax.device_get(whole(params, asked, step))}
    for batches in (1, BATCHES // 2, BATCHES):
        writer = TextWriter(
            mesh,
            definition,
            decoder,
            lambda model, batch, key: batch,
            num_slots=batches * ROWS,
            batch_size=ROWS,
            seed=0,
        )
        ways[f"{batches * ROWS} slots"] = lambda step, writer=writer: writer.write(params, asked, step)
    speeds = {name: [] for name in ways}
    for step in range(1 + TURNS):  # the first turn compiles
        lengths = {}
        for name, write in ways.items():
            start = time.process_time()
            texts = write(step)
            seconds = time.process_time() - start
            lengths[name] = texts.target_mask.sum(axis=1)
            speeds[name] += [lengths[name].sum() / seconds] * (step > 0)
        # A tie may be decided differently, and then the rest of that text.
        assert all(np.sum(found != lengths["one batch"]) <= 2 for found in lengths.values())
    length = lengths["one batch"]
    print(f"\n{len(length)} texts of {length.min()} to {length.max()} tokens, {length.mean():.0f} on average")
    speeds = {name: statistics.median(found) for name, found in speeds.items()}
    for name, speed in speeds.items():
        print(f"{name}: {speed:.0f} tokens per second of CPU time, {speed / speeds['one batch']:.2f} x")
    assert speeds["8 slots"] > 1.3 * speeds["one batch"] and speeds["32 slots"] > 1.1 * speeds["one batch"]
