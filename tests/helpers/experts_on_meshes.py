"""Trains a mixture of experts on several meshes of eight devices and prints what it saw; run by `test_mixture.py`."""

import json

import jax
import numpy as np
import optax
import tiny

from diffusion_t5x import partitioning
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.step import make_train_step

MESHES = {
    "one": MeshConfig().make(jax.devices()[:1]),
    "data_fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2).make(),
    "sequence_tensor": MeshConfig(data=2, sequence=2, tensor=2).make(),
    "expert": MeshConfig(fsdp=2, expert=4).make(),
    "expert_tensor": MeshConfig(data=2, expert=2, tensor=2).make(),
    "rows_and_experts_on_one_axis": MeshConfig(data=4, fsdp=2, rules={"embed": (), "experts": ("fsdp",)}).make(),
}
BATCH = tiny.one_a_row(tiny.random_examples(0, [(1 + n % 4, 8) for n in range(8)]), length=12)


def see(mesh):
    """The metrics of three steps, the first step's gradients, and the shape of a device's experts."""
    definition, optimizer = tiny.make_model(tiny.EXPERTS)[0], optax.adam(3e-3)
    rows = partitioning.put_batch(mesh, BATCH)
    with jax.set_mesh(mesh):
        abstract, state = tiny.fresh_state(mesh, definition, optimizer)
        step = make_train_step(mesh, abstract, definition, Block(4), optimizer, seed=0)
        metrics = []
        for _ in range(3):
            state, said = step(state, rows)
            metrics.append({name: float(value) for name, value in said.items()})
            if len(metrics) == 1:
                gradients = jax.device_get(state.opt_state[0].mu)  # after one step, a tenth of them
    held = state.params["decoder"]["blocks"]["mlp"]["wi_0"].addressable_shards[0].data.shape
    return metrics, gradients, list(held)


def apart(gradients, expected):
    """The largest difference of a parameter's gradients, as a share of its largest one."""
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True)
    return float(max(np.abs(x - y).max() / np.abs(y).max() for x, y in pairs if y.any()))


runs = {name: see(mesh) for name, mesh in MESHES.items()}
seen = {
    name: {"metrics": metrics, "gradients": apart(gradients, runs["one"][1]), "held": held}
    for name, (metrics, gradients, held) in runs.items()
}
print(json.dumps(seen))
