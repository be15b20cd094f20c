"""Reads a checkpoint's arrays: a whole state, a state that starts from another run's, or only parameters."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from diffusion_t5x.checkpointing import merging, stored
from diffusion_t5x.checkpointing.assignment import Rule, assign, named_leaves
from diffusion_t5x.checkpointing.checkpoints import AnyCheckpoint, open_checkpoint
from diffusion_t5x.errors import UserError

Tree = TypeVar("Tree")


def restore(path: AnyCheckpoint, abstract_state: Tree) -> tuple[Tree, dict[str, np.ndarray], dict[str, Any]]:
    """Restores everything that `Checkpoints.save` wrote: state, data state and metadata.

    Args:
      path: a user's path, or an open checkpoint.
      abstract_state: tree of `jax.ShapeDtypeStruct` whose shardings say where each array goes; the mesh may differ from
        the one it was saved from. A leaf without sharding is returned as a numpy array.

    Raises:
      UserError: there is no such checkpoint, or it does not fit the state.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    data_state = stored.read_tree(checkpoint.path, "data") if (checkpoint.path / "data").exists() else {}
    return _restore(checkpoint.path, abstract_state, reader=stored), data_state, checkpoint.metadata


def restore_initial(
    path: AnyCheckpoint, abstract_state: Tree, rules: Sequence[Rule] = (), init: Callable[[], Tree] | None = None
) -> Tree:
    """Makes a state from a checkpoint by assignment rules, as in T5X (see `assignment.assign`).

    The factors of a LoRA run are merged (see `merging`), as in every reader of checkpoints except `restore`.

    Args:
      path: a user's path, or an open checkpoint.
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.
      rules: `(target regex, source template or None)`, in order. For a fresh optimizer: `("opt_state/.*", None)`.
      init: makes the fresh state, traceable by `jax.jit`; needed if a rule keeps an array fresh. Only fresh arrays are
        computed.

    Raises:
      UserError: no checkpoint, an unused rule, or arrays that do not fit.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.verify("state")
    return _restore(checkpoint.path, abstract_state, rules, init)


def restore_params(
    path: AnyCheckpoint, abstract_params: Tree, rules: Sequence[Rule] = (), use_ema: bool = False, merge: bool = True
) -> Tree:
    """Reads only the parameters of a checkpoint, without the optimizer's state.

    Args:
      path: a user's path, or an open checkpoint.
      abstract_params: tree of `jax.ShapeDtypeStruct` with shardings.
      rules: assignment rules; names begin with `params/`.
      use_ema: take the moving average of the parameters if the checkpoint has one and no rule says otherwise.
      merge: read the plain model of a LoRA run; otherwise its factors as they are.

    Raises:
      UserError: no checkpoint, an unused rule, or arrays that do not fit.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.verify("state")
    reader = merging if merge else stored
    if use_ema and any(name.startswith("ema/") for name in reader.leaves(checkpoint.path)):
        rules = [*rules, (r"params/(.*)", r"ema/\1")]
    return _restore(checkpoint.path, {"params": abstract_params}, rules, reader=reader)["params"]


def open_params(
    path: AnyCheckpoint, use_ema: bool = True, merge: bool = True
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Opens the parameters of a checkpoint, to read them one by one.

    Args:
      path: a user's path, or an open checkpoint.
      use_ema: take the parameters' moving average if the checkpoint has one.
      merge: read the plain model of a LoRA run; otherwise its factors as they are.

    Returns:
      The shapes by name, and a function that reads one parameter.

    Raises:
      UserError: no checkpoint, or a broken one.
    """
    opened = open_checkpoint(path)
    opened.verify("state")
    checkpoint, reader = opened.path, merging if merge else stored
    leaves = reader.leaves(checkpoint)
    part = "ema/" if use_ema and any(name.startswith("ema/") for name in leaves) else "params/"
    shapes = {name.removeprefix(part): tuple(leaf.shape) for name, leaf in leaves.items() if name.startswith(part)}

    def read(name: str) -> np.ndarray:
        target = {name: jax.ShapeDtypeStruct(shapes[name], np.float32)}
        return reader.read_arrays(checkpoint, target, {name: part + name})[name]

    return shapes, read


def _restore(
    checkpoint: epath.Path,
    abstract_state: Tree,
    rules: Sequence[Rule] = (),
    init: Callable[[], Tree] | None = None,
    reader: ModuleType = merging,
) -> Tree:
    targets, sources = named_leaves(abstract_state, reader.is_leaf), reader.leaves(checkpoint)
    try:
        assignment = assign(targets, sources, rules)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    leaves = _initialise({t: targets[t] for t, source in assignment.items() if source is None}, init, reader.is_leaf)
    leaves |= reader.read_arrays(checkpoint, targets, {t: s for t, s in assignment.items() if s is not None})
    return jax.tree.unflatten(
        jax.tree.structure(abstract_state, is_leaf=reader.is_leaf), [leaves[name] for name in targets]
    )


def _initialise(
    abstract: dict[str, Any], init: Callable[[], Any] | None, is_leaf: Callable[[Any], bool] | None
) -> dict[str, Any]:
    if not abstract:
        return {}
    if init is None:
        names = ", ".join(abstract)
        raise UserError(f"No assignment rule may leave parameters fresh here, but these would be: {names}.")

    def fresh():
        leaves = named_leaves(init(), is_leaf)
        return {name: leaves[name] for name in abstract}

    return jax.jit(fresh, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
