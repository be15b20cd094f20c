"""TPU slices without hardware: peak figures of their chips, and their devices for the compiler.

Peaks are from Google's pages on each chip (docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e; "TPU versions"):
bfloat16 FLOP/s, size and bandwidth of the memory (HBM), and the bandwidth of all interconnect links of a chip, in one
direction. v4 and v5p state the last as 2,400 and 4,800 Gbit/s; v5e and v6e as 400 and 800 GB/s in both directions.
"""

import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from diffusion_t5x.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip.

    Attributes:
      name: name as in "v5p:4x4x8".
      flops: peak of bfloat16 matrix products, FLOP/s.
      hbm_bytes: size of its memory, in bytes.
      hbm_bandwidth: bytes/s.
      interconnect_bandwidth: bytes/s that all its links together send to other chips of the slice.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    interconnect_bandwidth: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 << 30, 1228e9, 300e9),
        Chip("v5e", 197e12, 16 << 30, 819e9, 200e9),
        Chip("v5p", 459e12, 95 << 30, 2765e9, 600e9),
        Chip("v6e", 918e12, 32 << 30, 1638e9, 400e9),
    )
}


def find_slice(name: str) -> tuple[Chip, list[jax.Device]]:
    """Returns the chip of a slice such as "v5p:4x4x8", and devices to compile for; programs cannot run on them.

    JAX uses only the CPU afterwards, so call this before anything looks for devices.

    Raises:
      UserError: there is no such chip or slice, or the compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={name}: write a chip ({', '.join(CHIPS)}) and the shape of a slice, as in v5p:4x4x8."
            f"{did_you_mean(kind, CHIPS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('--topology needs the TPU compiler: pip install "diffusion_t5x[tpu]".')
    jax.config.update("jax_platforms", "cpu")
    # Else the compiler asks the network what machine this is, and lets no second process compile beside it.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= settings | dict(os.environ)
    megacore = {"chip_config_name": "megacore"} if kind == "v4" else {}  # both cores of a v4 chip as one device
    try:
        return CHIPS[kind], list(topologies.get_topology_desc(name, "tpu", **megacore).devices)
    except Exception as error:
        raise UserError(f"--topology={name}: the TPU compiler does not know this slice ({error}).") from error
