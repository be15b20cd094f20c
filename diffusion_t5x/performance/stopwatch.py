"""Times decoders on whole texts: no task, no checkpoint, no TensorFlow."""

import contextlib
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import jaxlib.version
import numpy as np
from jax.sharding import Mesh

import diffusion_t5x
from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.performance.roofline import Memory

_LEAST_GAIN = 1.1


class OutOfMemory(Exception):
    """Raised if the batch does not fit into memory."""


def endless_vocabulary(size: int) -> TokenIds:
    """Returns ids without an end of text: EOS and pad are MASK, which no decoder writes."""
    if size < 2:
        raise UserError(f"A benchmark's vocabulary_size must be at least 2, not {size}: one id is MASK.")
    last = size - 1
    return TokenIds(size=size, pad_id=last, eos_id=last, mask_id=last, start_id=0, noise_ranges=((0, last),))


def random_batch(definition: ModelDefinition, batch_size: int, input_length: int, length: int, seed: int) -> Batch:
    """Returns rows of `input_length` random tokens and `length` targets, laid out for the model's architecture."""
    inputs = np.random.default_rng(seed).integers(
        0, definition.vocabulary.mask_id, (batch_size, input_length), np.int32
    )
    targets = np.zeros((batch_size, length), np.int32)
    is_encoder_decoder = definition.config.architecture == "encoder_decoder"
    tokens = targets if is_encoder_decoder else np.concatenate([inputs, targets], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = Batch(
        tokens=tokens,
        target_mask=positions >= tokens.shape[1] - length,
        segment_ids=np.ones_like(tokens),
        positions=positions,
        example_ids=np.arange(batch_size, dtype=np.int32),
    )
    if not is_encoder_decoder:
        return batch
    return batch.replace(
        encoder_tokens=inputs,
        encoder_segment_ids=np.ones_like(inputs),
        encoder_positions=np.broadcast_to(np.arange(input_length, dtype=np.int32), inputs.shape),
    )


class Stopwatch:
    """A decoder, compiled for one batch and run once.

    Args:
      mesh: mesh of the devices.
      definition: the model, with a vocabulary that ends no text.
      params: its parameters.
      decoder: the timed decoder.
      batch: on the host.
      seed: seed of the decoder.

    Attributes:
      forwards: number of model passes in a run.
      peak_bytes: memory of each device as planned by XLA.

    Raises:
      OutOfMemory: on the device or, if that is the CPU, in the machine.
      RuntimeError: a target was not written, or comes after an end of text, so the time would be meaningless.
    """

    def __init__(
        self, mesh: Mesh, definition: ModelDefinition, params: Params, decoder: Decoder, batch: Batch, seed: int
    ):
        self._mesh = mesh
        with jax.set_mesh(mesh), noticing_memory():
            self._arguments = params, partitioning.put_batch(mesh, batch)
            step = make_decode_step(mesh, definition, decoder, seed=seed)
            self._step = step.lower(*self._arguments).compile()
            self.peak_bytes = peak_bytes(self._step)
            decoded = jax.device_get(self._step(*self._arguments))
        ends = decoded.tokens[batch.target_mask] == definition.vocabulary.eos_id
        if np.any(ends):
            raise RuntimeError(f"{np.sum(ends)} of {np.size(ends)} targets were left out: this time is not meaningful.")
        self.forwards = int(decoded.steps)

    def seconds(self) -> float:
        """Returns the seconds of one more run."""
        with jax.set_mesh(self._mesh):
            start = time.perf_counter()
            jax.block_until_ready(self._step(*self._arguments))
            return time.perf_counter() - start


@contextlib.contextmanager
def noticing_memory() -> Iterator[None]:
    """Raises `OutOfMemory` for a device's own error."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory from error
        raise


def peak_bytes(program: jax.stages.Compiled) -> int:
    """Returns the memory of each device as planned by XLA: arguments, results and intermediate values.

    Raises:
      OutOfMemory: on the CPU, if the machine has less: the system would kill the process.
    """
    peak = Memory.of(program).peak
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if jax.default_backend() == "cpu" and peak > there:
        raise OutOfMemory
    return peak


def saturating_batch(seconds_of: Callable[[int], float | None], start: int, most: int) -> int:
    """Returns the batch size beyond which doubling raises the texts per second by less than a tenth.

    Args:
      seconds_of: returns the time of a batch of this size; None if it does not fit into memory.
      start: first batch size, then doubled; it must fit.
      most: maximum batch size.
    """
    size, seconds = start, seconds_of(start)
    assert seconds is not None, "the first batch fits"
    while 2 * size <= most:
        twice = seconds_of(2 * size)
        if twice is None or 2 * seconds < _LEAST_GAIN * twice:
            break
        size, seconds = 2 * size, twice
    return size


def describe_machine() -> dict[str, Any]:
    """Returns devices, processor, versions, and XLA's flags."""
    cpu_info = pathlib.Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device_kind": jax.devices()[0].device_kind,
        "num_devices": len(jax.devices()),
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "flax": flax.__version__,
        "diffusion_t5x": diffusion_t5x.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def device_name(machine: Mapping[str, Any]) -> str:
    """Returns the machine in a few words."""
    kind = machine["device_kind"]
    name = (
        f"{machine['processor']}, {machine['cores']} cores" if kind == "cpu" else f"{machine['num_devices']} × {kind}"
    )
    return f"{name}, jax {machine['jax']}"
