"""The mesh, and the mesh axes over which each logical axis is sharded."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_t5x.errors import UserError, did_you_mean

MESH_AXES = ("replica", "data", "fsdp", "expert", "sequence", "tensor")

# Logical axis -> mesh axes. An axis not named here is never cut.
LOGICAL_AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp", "expert"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert", "tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
}
# A mesh with other rules has one more axis, of size 1, whose name spells them. So the rules travel with the mesh, and
# JAX tells programs for meshes with different rules apart.
_OTHER_RULES = "rules:"


def leaf_name(path: jax.tree_util.KeyPath) -> str:
    """Returns the "/"-joined name of a leaf, such as "params/embedding"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices of each mesh axis.

    Attributes:
      replica: number of slices joined by a data-centre network; each has all parameters, and only gradients pass
        between them.
      data: replicas of the parameters in a slice; -1 takes all devices that the other axes leave.
      fsdp: shards the batch, and parameters and optimizer state along `embed`.
      expert: shards the batch, and the experts of a mixture; tokens travel to their experts (`mixture.routed`).
      sequence: shards activations along the length; every device gathers the keys and values of whole rows.
      tensor: shards heads, feed-forward layers, the experts of a mixture among devices, and vocabulary.
      rules: mesh axes of logical axes that override `LOGICAL_AXIS_RULES`, such as `{"embed": ("fsdp", "sequence")}`.
    """

    replica: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    rules: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Returns the mesh over all devices.

        Raises:
          UserError: an axis is not a number of devices, their product is not the number of devices, `replica` is not
            the number of slices, or JAX computes in 64 bits.
        """
        if jax.config.jax_enable_x64:  # type: ignore[attr-defined]  # JAX declares its settings as it runs
            raise UserError(
                "JAX computes in 64 bits (JAX_ENABLE_X64), which models do not support. Unset the variable, or call "
                'jax.config.update("jax_enable_x64", False) first.'
            )
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        others = [size for name, size in sizes.items() if name != "data"]
        if min(others) < 1 or (self.data < 1 and self.data != -1):
            raise UserError(f"Every axis of {self} must be at least 1; only data may be -1 and take the rest.")
        devices = jax.devices() if devices is None else devices
        if self.data == -1:
            sizes["data"] = max(1, len(devices) // math.prod(others))
        if math.prod(sizes.values()) != len(devices):
            raise UserError(
                f"The mesh {' × '.join(MESH_AXES)} = {' × '.join(map(str, sizes.values()))} does not match "
                f"{len(devices)} devices. Set the axes of MeshConfig so that their product divides that number; "
                "data = -1 takes the rest."
            )
        if other_rules := _name(self.rules):
            sizes[other_rules] = 1
        axis_types = (AxisType.Auto,) * len(sizes)
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        if slices == 1:
            try:
                return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices)
            except NotImplementedError as error:
                raise UserError(
                    f"This slice cannot be cut into {' × '.join(f'{n} {name}' for name, n in sizes.items() if n > 1)}: "
                    "every axis of MeshConfig must be a product of some of the slice's own sizes, as 16 = 4 × 4 of "
                    "4 × 4 × 4."
                ) from error
        if self.replica != slices:
            raise UserError(f"The devices form {slices} slices: set MeshConfig.replica = {slices}, not {self.replica}.")
        within = [1, *list(sizes.values())[1:]]
        across = [slices] + [1] * len(within[1:])
        return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), tuple(sizes), axis_types=axis_types)


def _name(overrides: Mapping[str, Sequence[str]]) -> str:
    """Returns the axis name for these rules, such as "rules:embed=fsdp+sequence;vocab="; "" for no rules."""
    for axis, mesh_axes in overrides.items():
        if axis not in LOGICAL_AXIS_RULES:
            raise UserError(f"MeshConfig.rules: no logical axis {axis!r}.{did_you_mean(axis, LOGICAL_AXIS_RULES)}")
        if isinstance(mesh_axes, str) or not set(mesh_axes) <= set(MESH_AXES):
            raise UserError(
                f"MeshConfig.rules[{axis!r}] must be a tuple of mesh axes ({', '.join(MESH_AXES)}), not {mesh_axes!r}."
            )
    rules = ";".join(f"{axis}={'+'.join(overrides[axis])}" for axis in sorted(overrides))
    return rules and _OTHER_RULES + rules


def rules_of(mesh: Mesh | AbstractMesh) -> Mapping[str, tuple[str, ...]]:
    """Returns the mesh axes that each logical axis is sharded over on this mesh."""
    rules = dict(LOGICAL_AXIS_RULES)
    for name in mesh.axis_names:
        if name.startswith(_OTHER_RULES):
            pairs = (rule.split("=") for rule in name.removeprefix(_OTHER_RULES).split(";"))
            rules |= {axis: tuple(filter(None, mesh_axes.split("+"))) for axis, mesh_axes in pairs}
    return rules


def platform() -> str:
    """Returns the platform of the devices that will run the traced program: "cpu", "gpu", "tpu".

    These are the devices of the current mesh, which may be a slice that this machine only compiles for.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def cut_on(mesh: AbstractMesh, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """Returns the sharding of an activation with these logical axes.

    Its `embed` axis stays whole, because the batch axis already uses the mesh axes that shard a parameter's. So does an
    axis that does not divide, such as the single token of a decoding step.
    """
    rules, free, cuts = rules_of(mesh), set(MESH_AXES), []
    for axis, size in zip(axes, shape, strict=True):
        cut = tuple(name for name in rules.get(axis, ()) if name in free and axis != "embed")
        pieces = math.prod(mesh.shape[name] for name in cut)
        cuts.append(() if size % pieces else cut)
        free -= set(cuts[-1])
    return PartitionSpec(*cuts)


def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Constrains the sharding of an activation with these logical axes on the current mesh, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, cut_on(mesh, axes, x.shape))


def pieces_of(axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Returns the number of shards of a logical axis; by default on the current mesh, and 1 without one."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in rules_of(mesh).get(axis, ()))


def copies(x: jax.Array, axes: Sequence[str], rows: int) -> jax.Array:
    """Returns a copy of x for each shard of `rows`, `[shards, ...]`; each device has one copy, which costs nothing.

    For arrays that all rows read inside a loop: gradients add up in each copy and are summed over the devices once,
    after the loop. Gradients of x itself would be summed in every iteration.
    """
    pieces = pieces_of("batch")
    pieces = 1 if rows % pieces else pieces
    return constrain(jnp.broadcast_to(x, (pieces, *x.shape)), ("batch", *axes))


def param_shardings(mesh: Mesh, abstract: Any, axes: Any) -> Any:
    """Returns the shardings of a tree of parameters.

    Args:
      mesh: the mesh.
      abstract: tree of shapes.
      axes: the same tree with a tuple of logical axis names for each leaf.

    Raises:
      UserError: an axis does not divide by the number of its devices, or two axes are sharded over the same devices.
    """

    rules = rules_of(mesh)

    def sharding(path, leaf, names):
        parameter = leaf_name(path)
        cuts = [rules.get(name, ()) for name in names]
        for mesh_axis in MESH_AXES:
            if len(cut := [name for name in names if mesh_axis in rules.get(name, ())]) > 1:
                raise UserError(
                    f"Parameter {parameter} of shape {leaf.shape}: its axes {' and '.join(map(repr, cut))} cannot both "
                    f"be sharded over the mesh axis {mesh_axis}. Change MeshConfig.rules."
                )
        for name, size, mesh_axes in zip(names, leaf.shape, cuts, strict=True):
            pieces = pieces_of(name, mesh)
            if size % pieces:
                raise UserError(
                    f"Parameter {parameter} of shape {leaf.shape}: its axis {name!r} of size "
                    f"{size} does not divide evenly over {pieces} devices (mesh axes {', '.join(mesh_axes)}). "
                    "Change MeshConfig or the model's size."
                )
        return NamedSharding(mesh, PartitionSpec(*cuts))

    return jax.tree_util.tree_map_with_path(sharding, abstract, axes)


def like_params(mesh: Mesh, tree: Any, params: Any, shardings: Any) -> Any:
    """Returns shardings of a tree of arrays shaped like parameters under the parameters' paths.

    Optimizer states are such trees: a leaf whose path ends in a parameter's path and that has its shape is sharded like
    the parameter; anything else (counts, factored moments) is replicated.
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
    """Returns the sharding of a batch: rows over the data axes, everything else replicated."""
    return NamedSharding(mesh, PartitionSpec(rules_of(mesh)["batch"]))


def check_batch(mesh: Mesh, batch_size: int, length: int) -> None:
    """Raises a UserError if a batch of `batch_size` rows of `length` positions does not divide over the mesh."""
    for whole, size, parts, axis in (("batch", batch_size, "rows", "batch"), ("row", length, "positions", "length")):
        if size % (pieces := pieces_of(axis, mesh)):
            raise UserError(
                f"A {whole} of {size} {parts} does not divide over {pieces} devices "
                f"(mesh axes {' × '.join(rules_of(mesh)[axis])})."
            )


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
    """Returns the index of this process's share of a batch's rows, and the number of shares.

    Processes with the same rows, as when `tensor` spans several processes, have the same share.

    Raises:
      UserError: processes share some rows but not others.
    """
    pieces: dict[int, set[int]] = {}
    for device, piece in _pieces(mesh, mesh.devices.flat).items():
        pieces.setdefault(device.process_index, set()).add(piece)
    shares = sorted(set(map(frozenset, pieces.values())), key=min)
    if sum(map(len, shares)) > pieces_of("batch", mesh):
        raise UserError(
            f"In the mesh {dict(mesh.shape)}, some processes share only a part of their rows: change the axes of "
            "MeshConfig so that two processes have all rows in common, or none."
        )
    return shares.index(frozenset(pieces[jax.process_index()])), len(shares)


def _pieces(mesh: Mesh, devices: Iterable[jax.Device]) -> dict[jax.Device, int]:
    """Returns the index of each device's shard of the rows."""
    places = batch_sharding(mesh).devices_indices_map((pieces_of("batch", mesh),))
    return {device: places[device][0].start or 0 for device in devices}


def put_rows(mesh: Mesh, batch: Any) -> Any:
    """Puts this process's share of the rows of a batch on the mesh, as global arrays."""
    sharding = batch_sharding(mesh)
    here = sorted(set(_pieces(mesh, mesh.local_devices).values()))

    def put(x):
        x = np.asarray(x)
        size = len(x) // len(here)

        def piece(index):
            first = here.index((index[0].start or 0) // size) * size
            return x[first : first + size]

        return jax.make_array_from_callback((pieces_of("batch", mesh) * size, *x.shape[1:]), sharding, piece)

    return jax.tree.map(put, batch)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Puts a batch that every process has in full on the mesh, as global arrays with their rows spread."""
    return _put(batch, batch_sharding(mesh))


def put_whole(mesh: Mesh, values: Any) -> Any:
    """Puts values that every process has in full on the mesh, as global arrays, whole on each device."""
    return _put(values, replicated(mesh))


def _put(values: Any, sharding: NamedSharding) -> Any:
    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, values)


def whole(tree: Any) -> Any:
    """Gathers sharded arrays as numpy on every process; all processes must call it at the same time."""
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)
