"""Decodes a batch on eight devices and prints the texts; run by `decoding/test_batch_invariance.py`."""

import json
import sys

import jax
import numpy as np
import tiny

from diffusion_t5x import partitioning
from diffusion_t5x.decoding.slots import Finished, SlotEngine
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.partitioning import MeshConfig

IN_SLOTS = ("ar, sampled", "block")


def texts(decoders, config, batch, seed):
    """The texts `[B, L]` of each decoder on a mesh of all devices, and of some in eight slots, a row after another."""
    definition, params = tiny.make_model(config)
    mesh = MeshConfig(data=2, fsdp=4).make()
    shardings = partitioning.param_shardings(mesh, definition.abstract(), definition.axes())
    params = jax.tree.map(jax.device_put, params, shardings)
    with jax.set_mesh(mesh):
        rows = partitioning.put_batch(mesh, batch)
        steps = {name: make_decode_step(mesh, definition, decoder, seed=seed) for name, decoder in decoders.items()}
        found = {name: np.asarray(step(params, rows).tokens).tolist() for name, step in steps.items()}
    for name in IN_SLOTS:
        engine = SlotEngine(mesh, definition, params, decoders[name], num_slots=8, length=batch.tokens.shape[1])
        waiting, decoded = list(range(len(batch.tokens))), {}
        while len(decoded) < len(batch.tokens):  # two join between two pieces
            for row in waiting[:2]:
                engine.submit(row, jax.tree.map(lambda x: x[row : row + 1], batch))  # noqa: B023
            waiting = waiting[2:]
            decoded |= {event.ident: event.decoded for event in engine.advance() if isinstance(event, Finished)}
        found[f"{name}, in slots"] = [decoded[row].tokens[0].tolist() for row in range(len(batch.tokens))]
    return found


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import test_batch_invariance as invariance

    assert len(jax.devices()) == 8
    decoders = {name: invariance.DECODERS[name] for name in invariance.ON_EIGHT}
    print(json.dumps(texts(decoders, tiny.RELATIVE, invariance.EIGHT_ROWS, seed=0)))
