"""Compiles a training step on rows of 4096 for four TPU v5e and prints its report; run by `test_dry_run.py`."""

import dataclasses
import json
import sys

import jax
import optax

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.performance import dry_run, topology
from diffusion_t5x.performance.roofline import Report
from diffusion_t5x.training.state import abstract_state
from diffusion_t5x.training.step import make_train_step

VOCABULARY = TokenIds(size=128, pad_id=0, eos_id=1, mask_id=127, start_id=0, noise_ranges=((2, 127),))
DECODER = ModelConfig(
    embed_dim=128, num_layers=2, num_heads=4, head_dim=64, mlp_dim=256, position="rotary", num_kv_heads=2,
    attention_scale=0.125, dtype="bfloat16", remat="full",
)  # fmt: skip
T5 = dataclasses.replace(DECODER, architecture="encoder_decoder", position="relative", num_kv_heads=None)
MODELS = {"decoder_only": DECODER, "t5": T5}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one length, inputs and targets alike."""

    length: int
    architecture: str

    @property
    def task_feature_lengths(self):
        apart = self.architecture == "encoder_decoder"
        return {"inputs": self.length, "targets": self.length} if apart else {"targets": self.length}


def see(config):
    """A step on four rows of 4096 slots, two devices sharing rows and two heads."""
    chip, devices = topology.find_slice("v5e:2x2")
    mesh = MeshConfig(data=1, fsdp=2, tensor=2).make(devices)
    definition, optimizer = ModelDefinition(config, VOCABULARY), optax.sgd(0.1)
    state = abstract_state(mesh, definition, optimizer, False)
    step = make_train_step(mesh, state, definition, Autoregressive(), optimizer, seed=0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = step.lower(state, dry_run.abstract_batch(mesh, Rows(4096, config.architecture), 4)).compile()
    return Report.of({}, chip, compiled, 0, 0).as_json() | {"kernels": compiled.as_text().count('"tpu_custom_call"')}


if __name__ == "__main__":
    name, backend = sys.argv[1:]
    print(json.dumps(see(dataclasses.replace(MODELS[name], attention_backend=backend))))
