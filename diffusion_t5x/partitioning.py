"""The mesh, and which of its axes each logical axis is cut along."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_t5x.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. An axis not named here is never cut.
LOGICAL_AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
}
# An activation's embed axis stays whole: its batch axis already uses the mesh axes that cut a parameter's.
ACTIVATION_AXIS_RULES = {**LOGICAL_AXIS_RULES, "embed": ()}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has.

    Attributes:
      data: replicas of the parameters; -1 takes the devices that the other axes leave.
      fsdp: cuts the batch, and parameters and optimizer state along `embed`.
      tensor: cuts heads, feed-forward and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over all devices.

        Raises:
          UserError: an axis is no number of devices, or they do not multiply to the number of devices.
        """
        if min(self.fsdp, self.tensor) < 1 or (self.data < 1 and self.data != -1):
            raise UserError(f"Every axis of {self} must be at least 1; only data may be -1 and take the rest.")
        devices = jax.devices() if devices is None else devices
        sizes = [self.data, self.fsdp, self.tensor]
        if self.data == -1:
            sizes[0] = max(1, len(devices) // (self.fsdp * self.tensor))
        if math.prod(sizes) != len(devices):
            raise UserError(
                f"The mesh data × fsdp × tensor = {' × '.join(map(str, sizes))} does not make {len(devices)} devices. "
                "Set MeshConfig.fsdp and MeshConfig.tensor so that their product divides that number; "
                "data = -1 takes the rest."
            )
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _mesh_axes(axes: Sequence[str], rules: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """For each logical axis the mesh axes that cut it; one that is used up is not used again."""
    free = set(MESH_AXES)
    found = []
    for axis in axes:
        found.append(tuple(name for name in rules.get(axis, ()) if name in free))
        free -= set(found[-1])
    return found


def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Holds an activation with these logical axes to its place on the mesh in use; nothing where none is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*_mesh_axes(axes, ACTIVATION_AXIS_RULES)))


def param_shardings(mesh: Mesh, abstract: Any, axes: Any) -> Any:
    """Shardings of a tree of parameters.

    Args:
      mesh: the mesh.
      abstract: tree of shapes.
      axes: the same tree with a tuple of logical axis names for each leaf.

    Raises:
      UserError: an axis does not divide by the devices it is cut over.
    """

    def sharding(path, leaf, names):
        cuts = _mesh_axes(names, LOGICAL_AXIS_RULES)
        for name, size, mesh_axes in zip(names, leaf.shape, cuts, strict=True):
            pieces = math.prod(mesh.shape[axis] for axis in mesh_axes)
            if size % pieces:
                parameter = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"Parameter {parameter} of shape {leaf.shape}: its axis {name!r} of size "
                    f"{size} does not divide into {pieces} pieces (mesh axes {', '.join(mesh_axes)}). "
                    "Change MeshConfig or the model's size."
                )
        return NamedSharding(mesh, PartitionSpec(*cuts))

    return jax.tree_util.tree_map_with_path(sharding, abstract, axes)


def like_params(mesh: Mesh, tree: Any, params: Any, shardings: Any) -> Any:
    """Shardings of a tree that holds arrays shaped like parameters under the parameters' paths.

    Optimizer states are such trees: a leaf whose path ends in a parameter's path and that has its shape is cut as
    the parameter is; anything else (counts, factored moments) stands whole on every device.
    """
    by_path = {
        tuple(map(str, path)): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def sharding(path, leaf):
        names = tuple(map(str, path))
        for start in range(len(names)):
            shape, found = by_path.get(names[start:], (None, None))
            if shape == leaf.shape:
                return found
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch: the rows are cut, all other axes whole."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_AXIS_RULES["batch"]))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Raises a UserError when the rows of a batch do not divide over the mesh."""
    pieces = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % pieces:
        raise UserError(f"A batch of {batch_size} rows does not divide over {pieces} devices (mesh axes data × fsdp).")


def local_rows(tree: Any) -> Any:
    """This host's rows of arrays that are cut as batches are, numpy: the way back from `put_batch`."""

    def gather(x):
        pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])

    return jax.tree.map(gather, tree)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """A host's part of the batch as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
