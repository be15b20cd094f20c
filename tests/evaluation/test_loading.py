"""A checkpoint's parameters as what reads them wants them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.partitioning import MeshConfig


def test_matrices_are_read_in_the_dtype_of_the_activations(tmp_path):
    _, params = tiny.make_model(tiny.GPT2)
    store = checkpoints.Checkpoints(str(tmp_path), asynchronous=False)
    store.save(3, {"params": params}, {}, {"vocabulary": tiny.VOCABULARY.describe()})
    store.close()
    mesh = MeshConfig().make()
    low, found = load_model(str(tmp_path), dataclasses.replace(tiny.GPT2, dtype="bfloat16"), tiny.VOCABULARY, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, low.as_read(params))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    _, found = load_model(str(tmp_path), tiny.GPT2, tiny.VOCABULARY, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, params)
