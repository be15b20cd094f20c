"""Reads a LoRA run's checkpoint as the merged model: `base + alpha / rank * down up`.

If only drafts were trained, the plain model is the base. All other checkpoints are read as they are.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_t5x.checkpointing import stored
from diffusion_t5x.models.low_rank import LowRank

_FACTORS = ("base", "down", "up")


def plain(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's or a state's arrays by the plain model's names; a matrix with factors has its base's."""
    return {name: leaves[parts[0]] for name, parts in _parts(leaves).items()}


def leaves(checkpoint: epath.Path) -> dict[str, Any]:
    """Same as `stored.leaves`, for the plain model."""
    return plain(stored.leaves(checkpoint))


def read_arrays(checkpoint: epath.Path, targets: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """Same as `stored.read_arrays`, for the plain model. Sums are float32 before they get the target's dtype."""
    found = stored.leaves(checkpoint)
    parts = _parts(found)
    has_factors = any(len(parts[source]) > 1 for source in sources.values())
    settings = stored.read_metadata(checkpoint)["lora"] if has_factors else {}
    drafts_only = settings.get("drafts_only", False)
    as_they_are = {
        target: parts[source][0] for target, source in sources.items() if drafts_only or len(parts[source]) == 1
    }
    arrays = stored.read_arrays(checkpoint, targets, as_they_are)
    for target in [target for target in sources if target not in as_they_are]:  # in every process's order
        shapes = {name: found[name].shape for name in parts[sources[target]]}
        arrays[target] = _merged(checkpoint, targets[target], shapes, settings["alpha"] / settings["rank"])
    return arrays


def _merged(checkpoint: epath.Path, target: Any, shapes: dict[str, tuple[int, ...]], scale: float) -> Any:
    cut = target.sharding
    whole = NamedSharding(cut.mesh, PartitionSpec()) if isinstance(cut, NamedSharding) else cut
    wanted = {
        name: jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        for (name, shape), sharding in zip(shapes.items(), (cut, whole, whole), strict=True)
    }
    arrays = stored.read_arrays(checkpoint, wanted, {name: name for name in wanted})
    base, down, up = (arrays[name] for name in wanted)
    low_rank = LowRank(base, down, up, scale=scale)
    merged = jax.jit(lambda x: x.merged().astype(target.dtype), out_shardings=cut)(low_rank)
    return np.asarray(merged) if cut is None else merged


def _parts(names: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Returns for each name of the plain model its parts: an array of its own, or a base, `down` and `up`.

    A LoRA run averages only the trained parameters; the plain model's average has all others as they are.
    """
    matrices = {name.removesuffix("/base") for name in names if name.endswith("/base")}
    if not matrices:
        return {name: (name,) for name in names}
    in_a_matrix = {f"{matrix}/{part}" for matrix in matrices for part in _FACTORS}
    found: dict[str, tuple[str, ...]]
    found = {name: (name,) for name in names if name not in in_a_matrix and not name.startswith("ema/")}
    found |= {matrix: tuple(f"{matrix}/{part}" for part in _FACTORS) for matrix in matrices}
    if any(name.startswith("ema/") for name in names):

        def averaged(name: str) -> str:
            average = "ema/" + name.removeprefix("params/")
            return average if average in names else name

        found |= {
            "ema/" + name.removeprefix("params/"): tuple(map(averaged, parts))
            for name, parts in found.items()
            if name.startswith("params/")
        }
    return found
