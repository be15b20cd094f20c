"""Runs every objective and decoder on this machine's accelerator, and the same on its CPU.

    python launch/accelerator_smoke.py --output /tmp/smoke.json

Losses and gradients: in float32 with exact products, and in bfloat16, beside the CPU's in float32. Texts: in float32
with exact products. Needs neither a checkpoint nor TensorFlow. Exits with 1 if something differs by more than it may.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import optax

from diffusion_t5x import records
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.flags import Parser
from diffusion_t5x.decoding.defaults import default_decoder
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.drafts import Drafts
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import stopwatch

OBJECTIVES: dict[str, Objective] = {
    "autoregressive": Autoregressive(),
    "SUNDAE": Sundae(),
    "masked": Masked(),
    "blocks, masked": Block(4),
    "blocks, uniform noise": Block(4, noise="uniform", weighting="uniform"),
    "distillation": Distillation(4, states="random"),
    "drafts": Drafts(4),
}
_MODEL = ModelConfig(
    embed_dim=128, num_layers=4, num_heads=4, head_dim=32, mlp_dim=256, position="rotary", dtype="float32"
)
_VOCABULARY, _ROWS, _INPUTS, _TARGETS = 512, 8, 16, 48
# Largest relative difference of a loss, and of a gradient's norm.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def losses(device: jax.Device, objective: Objective, dtype: str) -> tuple[float, float]:
    """Returns the loss of random rows and the norm of its gradient."""
    definition = ModelDefinition(dataclasses.replace(_MODEL, dtype=dtype), stopwatch.endless_vocabulary(_VOCABULARY))
    batch = stopwatch.random_batch(definition, _ROWS, _INPUTS, _TARGETS, seed=0)

    def loss(params):
        model = definition.bind(params)
        teacher = definition.bind(params) if objective.needs_teacher else None
        return objective.loss(model, batch, jax.random.key(1), teacher=teacher).loss.mean()

    with jax.default_device(device), jax.default_matmul_precision("highest"):
        params = definition.init(jax.random.key(0))
        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        return float(value), float(optax.global_norm(gradient))


def texts(device: jax.Device, objective: Objective) -> np.ndarray:
    """Returns the ids that the objective's default decoder writes, `[rows, targets]`."""
    decoder = default_decoder(objective.modes[0])
    assert decoder is not None
    definition = ModelDefinition(_MODEL, stopwatch.endless_vocabulary(_VOCABULARY))
    batch = stopwatch.random_batch(definition, _ROWS, _INPUTS, _TARGETS, seed=0)
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        mesh = MeshConfig().make([device])
        with jax.set_mesh(mesh):
            step = make_decode_step(mesh, definition, decoder, seed=0)
            return np.asarray(step(definition.init(jax.random.key(0)), batch).tokens)


def compare(name: str, objective: Objective) -> dict[str, Any]:
    """Returns what differs between this machine's first device and its CPU."""
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    expected = losses(cpu, objective, "float32")
    found: dict[str, Any] = {"objective": name, "loss": expected[0], "gradient_norm": expected[1], "failed": []}
    for dtype, tolerance in _TOLERANCE.items():
        values = losses(device, objective, dtype)
        off = max(abs(value / wanted - 1) for value, wanted in zip(values, expected, strict=True))
        found[f"{dtype}_relative_difference"] = off
        if not off <= tolerance:
            found["failed"].append(f"{dtype}: off by {off:.2e}, more than {tolerance:.0e}")
    same = texts(device, objective) == texts(cpu, objective)
    found |= {"decoder": str(default_decoder(objective.modes[0])), "equal_tokens": float(same.mean())}
    if not same.all(axis=1).mean() >= 0.75:  # a near tie may fall the other way, and the row with it
        found["failed"].append(f"only {same.all(axis=1).sum()} of {len(same)} texts are equal")
    return found


def main() -> int:
    """Returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="FILE", help="JSON file for the results")
    output = parser.parse_args().output
    results = []
    for name, objective in OBJECTIVES.items():
        results.append(compare(name, objective))
        print(json.dumps(results[-1]), flush=True)
        found = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "results": results}
        records.write_text(output, json.dumps(found, indent=1))
    return int(any(result["failed"] for result in results))


if __name__ == "__main__":
    with config.program():
        sys.exit(main())
