"""Trains a mixture of experts on several meshes of eight devices and prints what it saw; run by `test_mixture.py`.

It also shows what one layer does on a mesh whose devices send each other less than the router chooses.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from diffusion_t5x import partitioning
from diffusion_t5x.models.mixture import Mixture, choose
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
EXPERTS = dataclasses.replace(tiny.EXPERTS.experts, bias_rate=0.1)
BATCH = tiny.one_a_row(tiny.random_examples(0, [(1 + n % 4, 8) for n in range(8)]), length=12)


def see(mesh):
    """The metrics of three steps, the first step's gradients, the last biases, and the shape of a device's experts."""
    config = dataclasses.replace(tiny.EXPERTS, experts=EXPERTS)
    definition, optimizer = tiny.make_model(config)[0], optax.adam(3e-3)
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
    mixture = state.params["decoder"]["blocks"]["mlp"]
    held = mixture["wi_0"].addressable_shards[0].data.shape
    return metrics, gradients, jax.device_get(mixture["selection_bias"]).tolist(), list(held)


def apart(gradients, expected):
    """The largest difference of a parameter's gradients, as a share of its largest one."""
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True)
    return float(max(np.abs(x - y).max() / np.abs(y).max() for x, y in pairs if y.any()))


def bounded(mesh, capacity_factor):
    """The update by a layer without shared experts, and what it says has been dropped: of all slots, of a few.

    Beside them, the same sums with the factors of the choices that have no place set to 0, by numpy.
    """
    experts = dataclasses.replace(tiny.EXPERTS.experts, shared_mlp_dim=0, capacity_factor=capacity_factor)
    layer = Mixture(jax.random.key(0), 16, experts, activation="silu")
    x = jax.random.normal(jax.random.key(1), (8, 12, 16))
    some = jnp.arange(12)[None] < jnp.arange(8)[:, None]
    with jax.set_mesh(mesh):
        run = jax.jit(lambda x, counted: layer(x, None, counted))
        (update, of_all), (_, of_some) = run(x, jnp.ones((8, 12), bool)), run(x, some)
    chosen, factors = map(np.asarray, choose(experts, layer.scores(x), layer.selection_bias.get_value()))
    kept = with_a_place(chosen, factors, mesh, capacity_factor)
    wi_0, wi_1, wo = (kernel.get_value() for kernel in (layer.wi_0, layer.wi_1, layer.wo))
    inner = jax.nn.silu(jnp.einsum("bld,edm->blem", x, wi_0)) * jnp.einsum("bld,edm->blem", x, wi_1)
    outputs = np.take_along_axis(np.asarray(jnp.einsum("blem,emd->bled", inner, wo)), chosen[..., None], axis=2)
    expected = np.sum(outputs * np.where(kept, factors, 0)[..., None], axis=2)
    lost = ~kept
    return {
        "apart": float(np.abs(update - expected).max()),
        "largest": float(np.abs(expected).max()),
        "untouched": [int(lost.all(axis=-1).sum()), int((np.abs(np.asarray(update)).max(axis=-1) == 0).sum())],
        "dropped": [float(losses["dropped_choices"].ratio.mean()) for losses in (of_all, of_some)],
        "lost": [float(lost.mean()), float(lost[np.asarray(some)].mean())],
    }


def with_a_place(chosen, factors, mesh, capacity_factor):
    """True for the choices that are sent, by going through them in the order of their factors."""
    kept, devices, groups = np.zeros(chosen.shape, bool), mesh.size, mesh.shape["expert"]
    rows, held = len(chosen) // devices, 8 // groups
    most = math.ceil(capacity_factor * rows * chosen[0].size / groups)
    for device in range(devices):
        sent, first = [0] * groups, device * rows
        for row, *place in sorted(np.ndindex(rows, *chosen.shape[1:]), key=lambda at: -factors[first + at[0]][at[1:]]):
            to = chosen[(first + row, *place)] // held
            kept[(first + row, *place)] = sent[to] < most
            sent[to] += 1
    return kept


runs = {name: see(mesh) for name, mesh in MESHES.items()}
seen = {
    name: {"metrics": metrics, "gradients": apart(gradients, runs["one"][1]), "biases": biases, "held": held}
    for name, (metrics, gradients, biases, held) in runs.items()
}
print(json.dumps({"runs": seen, "bounded": bounded(MESHES["expert"], 0.4)}))
