"""Measures training steps here and in PyTorch side by side on a CPU: same model, rows, optimizer and threads, float32.

    python launch/torch_speed.py --output /tmp/torch_speed.json

needs PyTorch (`pip install "diffusion_t5x[hf]"`). The model of `torch_model.py` starts from our parameters. Before
anything is timed, both must have the same losses in the first steps; then they take turns.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
import torch
import torch.nn.functional as F
from torch_model import Transformer

from diffusion_t5x import partitioning
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import stopwatch
from diffusion_t5x.training.state import abstract_state, init_state
from diffusion_t5x.training.step import make_train_step

LEARNING_RATE = 1e-3
_CHECKED = 3  # steps


@dataclasses.dataclass(frozen=True)
class Case:
    """A size of gin/sizes with its vocabulary, and the rows of a step."""

    config: ModelConfig
    vocabulary: int
    rows: int
    length: int


_CPU = {"dtype": "float32", "scan_unroll": True}  # as hardware/cpu.gin
_TINY = ModelConfig(embed_dim=96, num_layers=4, num_heads=3, head_dim=32, mlp_dim=256, relative_buckets=128, **_CPU)
_SMALL = ModelConfig(embed_dim=512, num_layers=8, num_heads=6, head_dim=64, mlp_dim=1024, **_CPU)
CASES = {"tiny": Case(_TINY, 2048, rows=32, length=64), "small": Case(_SMALL, 32_128, rows=4, length=256)}


class Ours:
    """A training step of this project."""

    def __init__(self, definition: ModelDefinition, tokens: np.ndarray):
        mesh, optimizer = MeshConfig().make(), optax.adam(LEARNING_RATE)
        batch = stopwatch.random_batch(definition, len(tokens), 1, tokens.shape[1] - 1, seed=0)
        batch = batch.replace(tokens=tokens, target_mask=np.ones_like(tokens, bool))
        abstract = abstract_state(mesh, definition, optimizer, False)
        with jax.set_mesh(mesh):
            self._batch = partitioning.put_batch(mesh, batch)
            self._step = make_train_step(mesh, abstract, definition, Autoregressive(), optimizer, seed=0)
            self._state = init_state(abstract, definition, optimizer, seed=0)
        self._mesh = mesh
        self.params = jax.device_get(self._state.params)

    def steps(self, number: int) -> list[float]:
        with jax.set_mesh(self._mesh):
            losses = []
            for _ in range(number):
                self._state, metrics = self._step(self._state, self._batch)
                losses.append(metrics["loss"])
            return [float(loss) for loss in losses]


class Theirs:
    """The same training step in PyTorch."""

    def __init__(self, definition: ModelDefinition, tokens: np.ndarray, params: dict):
        self._model = Transformer(definition.config, tokens.shape[1])
        self._model.load(params)
        self._optimizer = torch.optim.Adam(self._model.parameters(), LEARNING_RATE, fused=True)
        self._targets = torch.from_numpy(tokens.astype(np.int64))
        self._read = F.pad(self._targets[:, :-1], (1, 0), value=definition.vocabulary.start_id)

    def steps(self, number: int) -> list[float]:
        losses = []
        for _ in range(number):
            loss = F.cross_entropy(self._model(self._read).flatten(0, 1), self._targets.flatten())
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            losses.append(loss.detach())
        return [loss.item() for loss in losses]


def start(name: str) -> dict[str, Ours | Theirs]:
    """Returns both trainers of a case, checked against each other.

    Raises:
      AssertionError: their losses differ.
    """
    case = CASES[name]
    definition = ModelDefinition(case.config, stopwatch.endless_vocabulary(case.vocabulary))
    tokens = np.random.default_rng(0).integers(0, case.vocabulary - 1, (case.rows, case.length), np.int32)
    ours = Ours(definition, tokens)
    theirs = Theirs(definition, tokens, ours.params)
    np.testing.assert_allclose(ours.steps(_CHECKED), theirs.steps(_CHECKED), rtol=1e-4)
    return {"diffusion_t5x": ours, "PyTorch": theirs}


def measure(name: str, num_steps: int, repeats: int) -> dict:
    """Returns the tokens per second of both, taking turns: medians, with the setting."""
    trainers = start(name)
    tokens = num_steps * CASES[name].rows * CASES[name].length
    rates: dict[str, list[float]] = {label: [] for label in trainers}
    for _ in range(repeats):
        for label, trainer in trainers.items():
            begin = time.perf_counter()
            trainer.steps(num_steps)
            rates[label].append(tokens / (time.perf_counter() - begin))
    medians = {label: statistics.median(values) for label, values in rates.items()}
    ratio = medians["diffusion_t5x"] / medians["PyTorch"]
    for label, values in rates.items():
        print(
            f"{name:6} {label:14} {medians[label]:8,.0f} tokens/s [{min(values):,.0f}, {max(values):,.0f}]", flush=True
        )
    print(f"{name:6} ratio {ratio:.2f}", flush=True)
    return {"tokens_per_second": rates, "medians": medians, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="a JSON file")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=5, help="per turn")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    machine = stopwatch.describe_machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    found = {name: measure(name, arguments.steps, arguments.repeats) for name in arguments.cases}
    pathlib.Path(arguments.output).write_text(json.dumps({"machine": machine, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
