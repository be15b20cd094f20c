"""No decoder holds the logits of a large vocabulary for all positions at once: compiled and weighed, not run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import MAX_LOGITS, ModelDefinition

V, T, ROWS = 262_144, 1024, 16
ALL_LOGITS = ROWS * T * V * 4  # bytes: 16 GiB
DECODERS = {
    "ar": AutoregressiveDecoder(temperature=1.0),
    "sundae": SundaeDecoder(num_steps=2, num_samples=1),
    "masked": MaskedDecoder(num_steps=2, temperature=1.0),
    "block": BlockDecoder(T // 2, MaskedDecoder(num_steps=2)),
}


def temporary_bytes(decoder):
    vocabulary = dataclasses.replace(tiny.VOCABULARY, size=V, mask_id=V - 1, noise_ranges=((0, V - 1),))
    config = ModelConfig(embed_dim=8, num_layers=1, num_heads=1, head_dim=8, mlp_dim=8)
    definition = ModelDefinition(config, vocabulary)
    batch = tiny.one_a_row([([3] * 8, [4] * T)] * ROWS)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)

    def step(params, batch):
        return decoder.decode(definition.bind(params), batch, jax.random.key(0))

    return jax.jit(step).lower(definition.abstract(), batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", DECODERS)
def test_logits_never_stand_whole(name):
    found = temporary_bytes(DECODERS[name])
    print(f"{name}: {found / 2**20:.0f} MiB of temporaries; all logits are {ALL_LOGITS / 2**20:.0f} MiB")
    # A piece is read out at a time: logits, noise, probabilities and their orders are a few arrays of its size.
    assert found < 8 * MAX_LOGITS * 4 < ALL_LOGITS / 4


def test_all_logits_at_once_would_be_seen():
    """The measure of the test above counts all logits where they stand whole."""

    def whole(hidden, embedding):
        logits = jnp.matmul(hidden, embedding.T)
        return jnp.argmax(logits + jax.random.gumbel(jax.random.key(0), logits.shape), axis=-1)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((ROWS, T, 8), (V, 8)))
    assert jax.jit(whole).lower(*shapes).compile().memory_analysis().temp_size_in_bytes >= ALL_LOGITS
