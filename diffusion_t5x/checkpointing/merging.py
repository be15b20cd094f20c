"""Reads a LoRA run's checkpoint as the merged model: `base + alpha / rank * down up`, from a base in any dtype.

If only drafts were trained, the plain model is the base. All other checkpoints are read as they are. Targets may be
`Quantized`; each is quantized as soon as it is read.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_t5x.checkpointing import stored
from diffusion_t5x.models.low_rank import LowRank
from diffusion_t5x.models.quantized import Quantized, is_quantized

_FACTORS = ("base", "down", "up")
is_leaf = is_quantized  # what is one array here


def plain(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's or a state's arrays by the plain model's names; a matrix with factors has its base's."""
    whole = _whole(leaves)
    return {name: whole[parts[0]] for name, parts in _parts(whole).items()}


def leaves(checkpoint: epath.Path) -> dict[str, Any]:
    """Same as `stored.leaves`, for the plain model."""
    return plain(stored.leaves(checkpoint))


def read_arrays(checkpoint: epath.Path, targets: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """Same as `stored.read_arrays`, for the plain model. Sums are float32 before they get the target's dtype."""
    found = _whole(stored.leaves(checkpoint))
    parts = _parts(found)
    has_factors = any(len(parts[source]) > 1 for source in sources.values())
    settings = stored.read_metadata(checkpoint)["lora"] if has_factors else {}
    if settings.get("drafts_only", False):
        parts = {name: read[:1] for name, read in parts.items()}
    as_they_are = {
        target: parts[source][0]
        for target, source in sources.items()
        if len(parts[source]) == 1 and not is_quantized(targets[target]) and not is_quantized(found[parts[source][0]])
    }
    arrays = stored.read_arrays(checkpoint, targets, as_they_are)
    for target in [target for target in sources if target not in as_they_are]:  # in every process's order
        read = {name: found[name] for name in parts[sources[target]]}
        scale = settings["alpha"] / settings["rank"] if len(read) > 1 else 0.0
        arrays[target] = _computed(checkpoint, targets[target], read, scale)
    return arrays


def _computed(checkpoint: epath.Path, target: Any, found: Mapping[str, Any], scale: float) -> Any:
    """Reads a matrix from a base, quantized or not, with or without factors; one at a time, as memory is short."""
    cut = target.codes.sharding if is_quantized(target) else target.sharding
    whole = NamedSharding(cut.mesh, PartitionSpec()) if isinstance(cut, NamedSharding) else cut
    wanted = {}
    for number, (name, leaf) in enumerate(found.items()):
        if is_quantized(leaf):
            for part, array in ((f"{name}/codes", leaf.codes), (f"{name}/absmax", leaf.absmax)):
                wanted[part] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=_fitting(cut, whole, array))
        else:
            wanted[name] = jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=whole if number else cut)
    arrays = _whole(stored.read_arrays(checkpoint, wanted, {name: name for name in wanted}))

    def compute(base: Any, *factors: jax.Array) -> Any:
        low_rank = LowRank(base, down=factors[0], up=factors[1], scale=scale) if factors else None
        matrix = low_rank.merged() if low_rank else base.dequantized() if is_quantized(base) else base
        return target.requantized(matrix) if is_quantized(target) else matrix.astype(target.dtype)

    computed = jax.jit(compute, out_shardings=jax.tree.map(lambda x: x.sharding, target))(*map(arrays.get, found))
    return jax.tree.map(np.asarray, computed) if cut is None else computed


def _fitting(cut: Any, whole: Any, array: Any) -> Any:
    """Returns the matrix's sharding if it divides a part of it, else `whole`."""
    try:
        return cut if cut is None or cut.shard_shape(array.shape) else whole
    except ValueError:
        return whole


def _whole(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arrays by name, with one `Quantized` for the parts of each."""
    found: dict[str, Any] = {}
    for name, leaf in leaves.items():
        matrix, _, part = name.rpartition("/")
        if part == "codes":
            found[matrix] = Quantized(leaf, leaves[f"{matrix}/absmax"])
        elif part != "absmax":
            found[name] = leaf
    return found


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
