"""Four models, every objective, five meshes of eight devices: run by `test_partitioning.py`.

Usage: mesh_matrix.py MODEL. Prints as JSON, for each objective and mesh, the losses of 20 steps, how far the
first step's gradients lie from one device's (relative norm), and the tokens that the objective's decoder writes.
"""

import json
import sys

import jax
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
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.step import make_train_step

STEPS = 20
LEARNING_RATE = 3e-3  # with 1e-2, some trajectories amplify rounding tenfold a step
MESHES = {
    "one": MeshConfig().make(jax.devices()[:1]),
    "data": MeshConfig().make(),
    "fsdp": MeshConfig(fsdp=8).make(),
    "data_fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2).make(),
    "sequence_tensor": MeshConfig(sequence=2, tensor=4).make(),
}
MESHES_OF_EXPERTS = {
    "fsdp_expert": MeshConfig(fsdp=2, expert=4).make(),
    "data_expert_tensor": MeshConfig(data=2, expert=2, tensor=2).make(),
}
PAIRS = {
    "Autoregressive": (Autoregressive(), AutoregressiveDecoder(temperature=0.7)),
    "Sundae": (Sundae(), SundaeDecoder(num_steps=2, num_samples=2)),
    "Masked": (Masked(), MaskedDecoder(num_steps=2)),
    "Block": (Block(block_size=4), BlockDecoder(4, MaskedDecoder(num_steps=2))),
}
EXAMPLES = tiny.random_examples(0, [(1 + n % 4, 8) for n in range(8)])
MODELS = {
    "decoder_only": (tiny.RELATIVE, tiny.one_a_row(EXAMPLES, length=12)),
    "experts": (tiny.EXPERTS, tiny.one_a_row(EXAMPLES, length=12)),
    "gpt2": (tiny.GPT2, tiny.one_a_row(EXAMPLES, length=12)),
    "encoder_decoder": (tiny.ENCODER_DECODER, tiny.pack_apart([[example] for example in EXAMPLES], 4, 8)),
}


def see(mesh, config, batch, objective, decoder):
    """Losses, the first step's gradients, tokens."""
    definition, optimizer = tiny.make_model(config)[0], optax.adam(LEARNING_RATE)
    rows = partitioning.put_batch(mesh, batch)
    with jax.set_mesh(mesh):
        abstract, state = tiny.fresh_state(mesh, definition, optimizer)
        # The same parameters everywhere: rounding in training does not reach what is decoded.
        tokens = make_decode_step(mesh, definition, decoder, seed=0)(state.params, rows).tokens
        step = make_train_step(mesh, abstract, definition, objective, optimizer, seed=0)
        losses = []
        for _ in range(STEPS):
            state, metrics = step(state, rows)
            if not losses:
                gradients = jax.device_get(state.opt_state[0].mu)  # after one step, a tenth of them
            losses.append(float(metrics["loss"]))
    return losses, gradients, np.asarray(tokens).tolist()


def norm(tree):
    return float(np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(tree))))


def main(model):
    seen, meshes = {}, MESHES
    if model == "experts":
        meshes = {name: MESHES[name] for name in ("one", "data_fsdp_tensor", "sequence_tensor")} | MESHES_OF_EXPERTS
    for name, pair in PAIRS.items():
        runs = {mesh: see(meshes[mesh], *MODELS[model], *pair) for mesh in meshes}
        one = runs["one"][1]
        seen[name] = {
            mesh: {
                "losses": losses,
                "gradients": norm(jax.tree.map(np.subtract, gradients, one)) / norm(one),
                "tokens": tokens,
            }
            for mesh, (losses, gradients, tokens) in runs.items()
        }
    print(json.dumps(seen))


main(sys.argv[1])
