"""Writes two rollouts on four devices, as one of some processes, and prints its share of the texts.

Arguments: number of processes, index of this one, address of the first.
"""

import json
import sys

import jax
import jax.numpy as jnp
import tiny

from diffusion_t5x import partitioning
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.ramps import Ramp
from diffusion_t5x.training.rollout import OnPolicyBatches, Rollout
from diffusion_t5x.training.state import TrainState

number, index, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if number > 1:
    jax.distributed.initialize(address, number, index)
mesh = MeshConfig(data=2, fsdp=2).make()
definition, params = tiny.make_model(tiny.LLAMA)


class Prompts:
    """This process's share of four prompts a batch, for ever."""

    next = 0

    def __next__(self):
        self.next += 1
        batch = tiny.one_a_row(tiny.random_examples(self.next, [((self.next + row) % 6, 3) for row in range(4)]), 8)
        share, shares = partitioning.share_of_rows(mesh)
        return tiny.rows_of(batch, range(share * 4 // shares, (share + 1) * 4 // shares))


decoder = BlockDecoder(3, MaskedDecoder(num_steps=3, temperature=1.0))
rollout = Rollout(decoder, num_batches=3, lengths=Ramp(9, 9), num_buckets=1, data_share=Ramp(0.3, 0.3))
batches = OnPolicyBatches(mesh, definition, rollout, Prompts(), num_inputs=5, batch_size=4, seed=7)
shardings = partitioning.param_shardings(mesh, definition.abstract(), definition.axes())
with jax.set_mesh(mesh):
    params = jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda at: jax.device_get(x)[at]),
        params,
        shardings,
    )
    texts = [batches.next_batch(TrainState(jnp.int32(step), params, ())) for step in range(6)]
print(json.dumps([[text.tokens.tolist(), text.written_at.tolist(), text.example_ids.tolist()] for text in texts]))
