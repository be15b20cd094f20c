"""Trains and decodes on several meshes of eight devices and prints what it saw; run by `test_partitioning.py`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from diffusion_t5x import partitioning
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.distillation import Distillation, Teacher
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.ramps import Ramp
from diffusion_t5x.training.rollout import OnPolicyBatches, Rollout
from diffusion_t5x.training.state import abstract_state, init_state
from diffusion_t5x.training.step import make_train_step

AUTOREGRESSIVE = Autoregressive(), AutoregressiveDecoder(temperature=0.7)
SUNDAE = Sundae(), SundaeDecoder(num_steps=3, num_samples=2)
RUNS = {  # every compilation takes seconds: no more than it takes to try each mesh and, on one, each model
    "one": (MeshConfig().make(jax.devices()[:1]), [AUTOREGRESSIVE, SUNDAE]),
    "data": (MeshConfig().make(), [SUNDAE]),
    "data_fsdp": (MeshConfig(data=2, fsdp=4).make(), [AUTOREGRESSIVE, SUNDAE]),
    "fsdp_sequence_tensor": (MeshConfig(data=1, fsdp=2, sequence=2, tensor=2).make(), [AUTOREGRESSIVE]),
}
ROLLOUT = "one", "data_fsdp"
FRESH = "one", "fsdp_sequence_tensor"  # the last cuts every axis that is cut
BATCH = tiny.one_a_row(tiny.random_examples(0, [(n % 4, 6) for n in range(8)]), length=10)


def shard(x):
    return list(x.addressable_shards[0].data.shape)


def some_shards(params):
    return [
        shard(x)
        for x in (
            params["embedding"],
            params["decoder"]["blocks"]["mlp"]["wi_0"],
            params["decoder"]["blocks"]["attention"]["out"],
        )
    ]


def see(name, mesh, pairs):
    definition, optimizer = tiny.make_model()[0], optax.adam(1e-2)
    rows = partitioning.put_batch(mesh, BATCH)
    seen = {"shards": {"batch": shard(rows.tokens)[0]}}
    with jax.set_mesh(mesh):
        hidden = jax.jit(lambda x: partitioning.constrain(x, ("batch", "length", "embed")))(jnp.zeros((8, 4, 16)))
        seen["shards"]["activation"] = shard(hidden)
        for objective, decoder in pairs:
            abstract, state = tiny.fresh_state(mesh, definition, optimizer)
            step = make_train_step(mesh, abstract, definition, objective, optimizer, seed=0)
            losses = []
            for _ in range(4):
                state, metrics = step(state, rows)
                losses.append(float(metrics["loss"]))
            decoded = make_decode_step(mesh, definition, decoder, seed=0)(state.params, rows)
            seen[type(objective).__name__] = {
                "losses": losses,
                "tokens": np.asarray(decoded.tokens).tolist(),
                "scores": np.asarray(decoded.scores).tolist(),
            }
        trees = {
            "parameters": state.params,
            "first moments": state.opt_state[0].mu,
            "second moments": state.opt_state[0].nu,
        }
        if name in FRESH:
            trees["fresh parameters"] = fresh = init_state(abstract, definition, optimizer, seed=0).params
            seen["fresh"] = [float(np.square(x).sum()) for x in jax.tree.leaves(jax.device_get(fresh))]
        seen["shards"] |= {name: some_shards(tree) for name, tree in trees.items()}
    return seen


class Prompts:
    """The same eight prompts for ever."""

    def __next__(self):
        return BATCH

    def state_dict(self):
        return {}


def distil(mesh):
    """Two steps on texts that the student writes: what it wrote, and the losses."""
    definition, params = tiny.make_model(tiny.LLAMA)
    optimizer = optax.adam(1e-2)
    rollout = Rollout(BlockDecoder(3, MaskedDecoder(num_steps=2, temperature=1.0)), 2, lengths=Ramp(6, 6))
    with jax.set_mesh(mesh):
        abstract, state = tiny.fresh_state(mesh, definition, optimizer)
        teacher = jax.tree.map(lambda x, at: jax.device_put(1.1 * x, at.sharding), params, abstract.params)
        teacher = Teacher(definition, teacher)
        step = make_train_step(mesh, abstract, definition, Distillation(3), optimizer, seed=0, teacher=teacher)
        texts = OnPolicyBatches(mesh, definition, rollout, Prompts(), num_inputs=3, batch_size=8, seed=0)
        seen = {"losses": [], "tokens": []}
        for _ in range(2):
            batch = texts.next_batch(state)
            state, metrics = step(state, partitioning.put_batch(mesh, batch))
            seen["losses"].append(float(metrics["loss"]))
            seen["tokens"].append(batch.tokens.tolist())
    return seen


def weigh():
    """A training step cut by fsdp alone, compiled: bytes of its arguments on a device and in all, and its program."""
    mesh = MeshConfig(data=1, fsdp=8).make()
    definition, optimizer = tiny.make_model(tiny.LLAMA)[0], optax.adam(1e-2)
    state = abstract_state(mesh, definition, optimizer, keep_ema=False)
    cut = partitioning.batch_sharding(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), BATCH)
    with jax.set_mesh(mesh):
        step = make_train_step(mesh, state, definition, Autoregressive(), optimizer, seed=0)
        compiled = step.lower(state, batch).compile()
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, batch)))
    return {"device": compiled.memory_analysis().argument_size_in_bytes, "all": total, "program": compiled.as_text()}


seen = {name: see(name, *run) for name, run in RUNS.items()}
seen["fsdp"] = weigh()
for name in ROLLOUT:
    seen[name]["Distillation"] = distil(RUNS[name][0])
print(json.dumps(seen))
