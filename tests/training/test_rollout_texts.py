"""Texts of a rollout in slots are those of one whole batch, in one process and in two."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from whole_rollouts import make_rollout_step

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.objectives.policy_gradient import PolicyGradient
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.rollout_texts import TextWriter, own_targets, prompts

DECODER = BlockDecoder(3, MaskedDecoder(num_steps=3, temperature=1.0))


def make_writer(definition, prepare=lambda model, batch, key: batch, num_slots=4, decoder=DECODER):
    mesh = MeshConfig(data=1, fsdp=1, tensor=1).make()
    return TextWriter(mesh, definition, decoder, prepare, num_slots=num_slots, batch_size=4, seed=-5)


@pytest.mark.slow
def test_texts_in_slots_are_those_of_a_whole_batch():
    """Twelve texts in four slots, some of which end early and some of which are given; two rollouts of the programs."""
    definition, params = tiny.make_model(tiny.LLAMA)
    definition = dataclasses.replace(definition, vocabulary=dataclasses.replace(tiny.VOCABULARY, eos_id=17))
    prepare = PolicyGradient(3, "coupled", draws=2).prepare_rollout
    data = tiny.one_a_row(tiny.random_examples(3, [(n % 6, 3) for n in range(12)]), length=8)
    asked, given = own_targets(data, prompts(data, 5, 9, 12), np.arange(12) % 5 == 1)
    writer = make_writer(definition, prepare)
    whole = make_rollout_step(definition, DECODER, -5, prepare)
    for step, given_here, params_here in ((3, given, params), (4, None, jax.tree.map(lambda x: 1.1 * x, params))):
        found = writer.write(params_here, asked, step, given_here)
        expected = jax.device_get(whole(params_here, asked, step, given_here))
        for name in ("tokens", "target_mask", "segment_ids", "positions", "example_ids", "written_at"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
        np.testing.assert_allclose(
            found.written_log_probability, expected.written_log_probability, rtol=1e-4, atol=1e-5
        )
        assert len(np.unique(found.target_mask.sum(axis=1))) > 1  # some end early
    assert (found.written_log_probability < 0).any()
    programs = writer._engines[17]._programs
    assert programs.advance._cache_size() == programs.begin._cache_size() == 1  # none is compiled for a later rollout


@pytest.mark.slow
def test_whole_canvases_in_slots_are_those_of_a_whole_batch():
    definition, params = tiny.make_model(tiny.LLAMA)
    decoder = MaskedDecoder(num_steps=3, order="random", temperature=1.0)
    asked = prompts(tiny.one_a_row(tiny.random_examples(3, [(n % 6, 3) for n in range(8)]), length=8), 5, 6, 6)
    found = make_writer(definition, decoder=decoder).write(params, asked, 3)
    expected = jax.device_get(make_rollout_step(definition, decoder, -5)(params, asked, 3))
    assert (found.written_at[found.target_mask] >= 0).all() and found.target_mask.sum() == 8 * 6
    for name in ("tokens", "target_mask", "segment_ids", "positions", "written_at"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.written_log_probability, expected.written_log_probability, rtol=1e-4, atol=1e-5)


def test_the_draws_of_a_rollout_are_not_those_of_another_step():
    definition, params = tiny.make_model(tiny.LLAMA)
    writer = make_writer(definition)
    data = tiny.one_a_row(tiny.random_examples(1, [(row, 3) for row in range(4)]), length=8)
    batch = prompts(data, 5, 6, 6)
    first, again, other = (writer.write(params, batch, step).tokens for step in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def written_by(number):
    """The texts of two rollouts that so many processes write on four devices, one list for each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={4 // number}"
    script = pathlib.Path(tiny.__file__).with_name("rollout_in_processes.py")
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(number), str(index), address],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(number)
    ]
    said = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0] * number
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.slow
def test_processes_write_together_what_one_writes():
    (alone,), shares = written_by(1), written_by(2)
    for batch, *parts in zip(alone, *shares, strict=True):
        for field, *pieces in zip(batch, *parts, strict=True):
            assert field == [row for piece in pieces for row in piece]
    written = [any(place >= 0 for place in row) for _, rows, _ in alone for row in rows]
    assert any(written) and not all(written)  # some are the data's own
