"""Checkpoints on disk: name, commit, and reading after verification."""

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath, epy
from flax import traverse_util
from jax.experimental import multihost_utils

from diffusion_t5x.checkpointing import manifest
from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.errors import UserError

with epy.lazy_imports():  # takes a while, and mistakes are answered without it
    import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"  # metrics of an evaluation that was finished after the checkpoint was
_METADATA = "metadata/metadata"
_ALWAYS_THERE = ("state/_METADATA", _METADATA)
_MAX_FAULTS = 5
is_leaf = None  # what is one array here, beside arrays; see `merging`


class BrokenCheckpoint(UserError):
    """Raised if a file of a checkpoint differs from what was written."""


def names() -> Any:
    """Returns Orbax's naming of the folders of checkpoints."""
    return ocp.path.step.standard_name_format(step_prefix="checkpoint")


def find_all(folder: epath.Path) -> list[Any]:
    """Returns Orbax's `step` and `path` of each finished checkpoint in a folder, by ascending step."""
    with contextlib.suppress(OSError):
        return sorted(names().find_all(folder), key=lambda found: found.step) if folder.is_dir() else []
    return []


def commit_class(directory: epath.Path) -> type:
    """Returns Orbax's commit class for this folder, which writes a manifest just before the commit."""
    base: Any = ocp.path.atomicity_defaults.get_default_temporary_path_class(directory)

    class WithManifest(base):
        async def finalize(self) -> None:
            whole = self.get_final().parent == directory  # Orbax commits the items of a checkpoint in the same way
            if whole:
                await asyncio.to_thread(manifest.write, self.get())
            await super().finalize()
            if whole:
                manifest.sync(directory)

    return WithManifest


def check(checkpoint: epath.Path, *items: str, found: tuple[manifest.Entries, str] | None = None) -> None:
    """Raises a BrokenCheckpoint if a file of these items (by default, any file) is not what was written.

    The error names the file and the newest whole checkpoint beside it. A checkpoint that is older than manifests passes
    if it has the files that every checkpoint has. `found` is the result of `manifest.read`, if it was called before.
    """
    wrong = faults(checkpoint, items, found=found)
    if wrong is None:
        _say_unchecked(checkpoint)
    if not wrong:
        return
    more = f"; and {len(wrong) - _MAX_FAULTS} more" if len(wrong) > _MAX_FAULTS else ""
    others = [found.path for found in reversed(find_all(checkpoint.parent)) if found.path != checkpoint]
    whole = next((other for other in others if is_whole(other)), None)
    remedy = (
        f"The newest intact one is {whole}: give its path, or let a training run continue from it with "
        "--gin.train.train.allow_older_checkpoint=True."
        if whole
        else "There is no intact one."
    )
    raise BrokenCheckpoint(f"{checkpoint} is broken: {'; '.join(wrong[:_MAX_FAULTS])}{more}. {remedy}")


def faults(
    checkpoint: epath.Path,
    items: Sequence[str] = (),
    checksums: bool = True,
    found: tuple[manifest.Entries, str] | None = None,
) -> list[str] | None:
    """Returns the problems of a checkpoint, one line each (see `manifest.faults`).

    None if they cannot be known, because the checkpoint is older than manifests.
    """
    has_manifest = manifest.has_manifest(checkpoint)
    wrong = manifest.faults(checkpoint, items, checksums, found) if has_manifest else []
    wrong = wrong or [f"it has no {name}" for name in _ALWAYS_THERE if not manifest.is_file(checkpoint / name)]
    step = None if wrong else _raw_metadata(checkpoint).get("step")
    if step is not None and step != int(checkpoint.name.rpartition("_")[2]):
        wrong = [f"it is of step {step} and was renamed: call it checkpoint_{step} again"]
    return wrong if wrong or has_manifest else None


def is_whole(checkpoint: epath.Path) -> bool:
    """True if every file is as it was written or, for a checkpoint without a manifest, if it can be opened."""
    found = faults(checkpoint)
    if found is not None:
        return not found
    try:
        return bool(leaves(checkpoint))
    except Exception:  # whatever a broken file makes Orbax raise
        return False


def latest_whole(directory: str) -> str | None:
    """Returns the newest whole checkpoint in a folder of `checkpoint_<step>` folders; None if there are no checkpoints.

    Raises:
      UserError: there are checkpoints, and all are broken.
    """
    found = find_all(epath.Path(directory))
    whole = next((str(checkpoint.path) for checkpoint in reversed(found) if is_whole(checkpoint.path)), None)
    if found and not whole:
        raise UserError(f"Every checkpoint in {directory} is broken: {', '.join(c.path.name for c in found)}.")
    return whole


def set_aside_after(path: str) -> None:
    """Renames all checkpoints that are newer than this one to `broken_checkpoint_<step>`.

    A run that continues from an older one writes those steps again and must not take these for its newest.
    """
    checkpoint = epath.Path(path)
    found = find_all(checkpoint.parent)
    newer = found[[other.path.name for other in found].index(checkpoint.name) + 1 :]
    set_aside([other.path for other in newer])


def set_aside(checkpoints: Sequence[epath.Path]) -> None:
    """Renames checkpoints to `broken_checkpoint_<step>`."""
    if jax.process_index() == 0:
        for path in checkpoints:
            names = [f"broken_{path.name}", *(f"broken_{path.name}_{i}" for i in range(2, 1000))]
            aside = next(name for name in names if not (path.parent / name).exists())
            path.rename(path.parent / aside)
            logger.warning("%s is broken: renamed to %s", path, aside)
    if checkpoints and jax.process_count() > 1:
        multihost_utils.sync_global_devices("set_aside")


def leaves(checkpoint: epath.Path) -> dict[str, Any]:
    """Returns shape and dtype of every array of a checkpoint, by name.

    Raises:
      UserError: it is broken, or another program wrote it.
    """
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(checkpoint / "state").tree
    except Exception as error:  # whatever a broken file makes Orbax raise
        check(checkpoint, "state")
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{checkpoint} was not written by this framework: it has no `state`.") from error
        raise
    return named_leaves(tree)


def read_metadata(checkpoint: epath.Path, found: tuple[manifest.Entries, str] | None = None) -> dict[str, Any]:
    """Returns the metadata given to `Checkpoints.save`, with the metrics of an evaluation that finished later.

    Raises:
      UserError: they are broken.
    """
    try:
        metadata = _read(checkpoint / "metadata", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
        if manifest.holds(checkpoint, EVALUATION, found):
            evaluation = json.loads((checkpoint / EVALUATION).read_text())
            metadata = {name: value for name, value in metadata.items() if name != "evaluation_due"} | evaluation
        _check_metadata(metadata)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{checkpoint} cannot be read: its metadata, which describe the model, are missing or broken ({error})."
        ) from error
    return metadata


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises a ValueError for metadata of another form: the checkpoint may be anyone's."""
    metrics = metadata.get("metrics", {})
    if not isinstance(metadata.get("config", ""), str):
        raise ValueError("`config` is no text")
    if not isinstance(metrics, dict) or not all(isinstance(value, float | int) for value in metrics.values()):
        raise ValueError("`metrics` are no numbers")
    for value in metrics.values():
        float(value)  # OverflowError: an integer that is too large


def write_evaluation(checkpoint: epath.Path, metrics: Mapping[str, float]) -> None:
    """Adds the metrics of an evaluation to a finished checkpoint, whose evaluation is no longer due then."""
    manifest.add(checkpoint, EVALUATION, json.dumps({"metrics": dict(metrics)}))


def read_tree(checkpoint: epath.Path, item: str) -> dict[str, np.ndarray]:
    return _read(checkpoint / item, ocp.PyTreeCheckpointHandler(), ocp.args.PyTreeRestore())


def read_arrays(checkpoint: epath.Path, targets: Mapping[str, Any], sources: dict[str, str]) -> dict[str, Any]:
    """Reads `targets` from `sources`, straight into their shardings and dtypes."""
    read: dict[str, Any] = {}
    while sources:
        # Two targets of one source (parameters and their moving average) need two buffers: one is read later.
        now = {source: target for target, source in reversed(sources.items())}
        tree = traverse_util.unflatten_dict({source: targets[target] for source, target in now.items()}, sep="/")
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True)
        restored = named_leaves(_read(checkpoint / "state", ocp.PyTreeCheckpointHandler(), args))
        read |= {target: restored[source] for source, target in now.items()}
        sources = {target: source for target, source in sources.items() if target not in read}
    return read


def _raw_metadata(checkpoint: epath.Path) -> dict[str, Any]:
    try:
        metadata = json.loads((checkpoint / _METADATA).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _read(path: epath.Path, handler: Any, args: Any) -> Any:
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(path, args=args)


@functools.cache
def _say_unchecked(checkpoint: epath.Path) -> None:
    logger.warning("%s was written without checksums, so it cannot be verified", checkpoint)
