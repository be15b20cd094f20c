"""Trains both architectures by every objective on five meshes of eight devices; run by `test_partitioning.py`."""

import json

import jax
import optax
import tiny

from diffusion_t5x import partitioning
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.step import make_train_step

MESHES = {
    "one": MeshConfig().make(jax.devices()[:1]),
    "data": MeshConfig().make(),
    "fsdp": MeshConfig(fsdp=8).make(),
    "data_fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2).make(),
    "sequence_tensor": MeshConfig(sequence=2, tensor=4).make(),
}
OBJECTIVES = [Autoregressive(), Sundae(), Masked(), Block(block_size=4)]
EXAMPLES = tiny.random_examples(0, [(1 + n % 4, 8) for n in range(8)])
MODELS = {
    "decoder_only": (tiny.RELATIVE, tiny.one_a_row(EXAMPLES, length=12)),
    "encoder_decoder": (tiny.ENCODER_DECODER, tiny.pack_apart([[example] for example in EXAMPLES], 4, 8)),
}


def losses(mesh, config, batch, objective):
    definition, optimizer = tiny.make_model(config)[0], optax.adam(1e-2)
    rows = partitioning.put_batch(mesh, batch)
    with jax.set_mesh(mesh):
        abstract, state = tiny.fresh_state(mesh, definition, optimizer)
        step = make_train_step(mesh, abstract, definition, objective, optimizer, seed=0)
        found = []
        for _ in range(3):
            state, metrics = step(state, rows)
            found.append(float(metrics["loss"]))
    return found


seen = {
    f"{architecture} {type(objective).__name__}": {
        name: losses(mesh, config, batch, objective) for name, mesh in MESHES.items()
    }
    for architecture, (config, batch) in MODELS.items()
    for objective in OBJECTIVES
}
print(json.dumps(seen))
