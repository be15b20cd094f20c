"""Checkpoints. Only this module, `stored.py` and `streaming.py` import Orbax.

A checkpoint is a folder `checkpoint_<step>` with three items:
  state: every array of the train state under its "/"-joined name, in plain nested dictionaries. It can be read without
    knowing the optimizer, in parts, by other names and onto another mesh.
  data: the position of the data iterator.
  metadata: JSON, written by the caller: step, tokenizer, operative gin, metrics.
and a manifest of all its files (see `manifest.py`), by which each item is checked before it is read. The metrics of an
evaluation that follows the save are added later, in a separate file.
It gets its name when all of it is written; what a killed process leaves behind is not a checkpoint.
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath, epy
from flax import traverse_util
from jax.experimental import multihost_utils

from diffusion_t5x.checkpointing import manifest, stored, streaming
from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.errors import UserError

with epy.lazy_imports():  # takes a while, and mistakes are answered without it
    import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run. Saves in the background; keeps the newest and, if asked to, the best.

    Args:
      directory: folder of the `checkpoint_<step>` folders; created if missing. Left-overs of killed saves are
        removed, so a folder has one writer at a time.
      keep_last: number of newest checkpoints to keep.
      keep_best: number of best checkpoints to keep as well, by `best_metric`.
      best_metric: key of `metadata["metrics"]`. A checkpoint without it is not among the best.
      best_mode: "max" if higher is better, "min" if lower is better.
      asynchronous: write while training continues; otherwise `save` returns when everything is written.
      streamed: what is saved holds `Streamed` leaves and numpy arrays.
    """

    def __init__(
        self,
        directory: str,
        keep_last: int = 3,
        keep_best: int = 0,
        best_metric: str = "",
        best_mode: str = "max",
        asynchronous: bool = True,
        streamed: bool = False,
    ):
        if keep_last < 1:
            raise UserError(
                f"Checkpoints.keep_last = {keep_last}: it must be at least 1, to keep the newest checkpoint."
            )
        if keep_best and not best_metric:
            raise UserError(f"Checkpoints.keep_best = {keep_best} needs Checkpoints.best_metric.")
        if best_mode not in ("max", "min"):
            raise UserError(f'Checkpoints.best_mode must be "max" or "min", not {best_mode!r}.')
        ensure_writable(directory)
        self.directory = epath.Path(directory).resolve()
        self._notes = {"manifest": True} | ({"best": [best_metric, best_mode]} if keep_best else {})
        self._kept = _Kept(self.directory, keep_last, keep_best, best_metric, best_mode)
        options = ocp.CheckpointManagerOptions(
            step_name_format=stored.names(),
            temporary_path_class=stored.commit_class(self.directory),
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=asynchronous,
        )
        handlers = streaming.handlers() if streamed else None
        self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=handlers)

    def save(self, step: int, state: Any, data_state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; does nothing if there is an intact one of this step.

        A broken one, or one of another step with this name, is renamed. The state's buffers may be donated as soon
        as this returns. Waits for the previous save, and raises its error, if any.

        Args:
          step: number of finished training steps.
          state: tree of arrays.
          data_state: the position of the data iterator, the same on every process.
          metadata: JSON-serialisable.
        """
        self.wait()
        json.dumps(metadata)  # raises here and not in the background
        if there := [found.path for found in stored.find_all(self.directory) if found.step == step]:
            if not stored.faults(there[0], checksums=False):
                return
            stored.set_aside(there)
            self._manager.reload()
        self._kept.metrics[step] = metadata.get("metrics", {})
        items = {
            "state": ocp.args.PyTreeSave(traverse_util.unflatten_dict(named_leaves(state), sep="/")),
            "metadata": ocp.args.JsonSave(dict(metadata)),
        }
        if data_state:  # Orbax writes no empty tree
            items["data"] = ocp.args.PyTreeSave(dict(data_state))
        self._manager.save(step, args=ocp.args.Composite(**items), force=True, custom_metadata=self._notes)

    def add_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of an evaluation to the checkpoint of this step, then deletes the checkpoints not to keep.

        Waits for the current save. If it is interrupted, the checkpoint stays whole, with or without the metrics.
        """
        self.wait()
        if jax.process_index() == 0:
            stored.write_evaluation(find_checkpoint(str(self.directory / f"checkpoint_{step}")), metrics)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("add_evaluation")
        self._kept.metrics.pop(step, None)  # to be read again, the same on every process
        there = self._manager.all_steps()
        for other in sorted(set(there) - self._kept.of(there)):
            self._manager.delete(other)

    def wait(self) -> None:
        """Returns when the current save is finished; raises its error, if any."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the current save and frees the threads."""
        self._manager.close()


class _Kept:
    """Selects the checkpoints to keep: the newest and the best. Orbax's own policy sees metrics only as it saves.

    Attributes:
      metrics: metrics by step, as far as they are known; others are read from the checkpoints.
    """

    def __init__(self, directory: epath.Path, keep_last: int, keep_best: int, best_metric: str, best_mode: str):
        self._directory, self._keep_last, self._keep_best = directory, keep_last, keep_best
        self._best_metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        self.metrics: dict[int, Mapping[str, float]] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's callback: returns for each checkpoint, by ascending step, True to keep it."""
        kept = self.of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def of(self, there: Sequence[int]) -> set[int]:
        """Returns the steps to keep among existing ones."""
        there = sorted(there)
        best = sorted((self._quality(step), step) for step in there if self._keep_best and self._is_measured(step))
        return {*there[-self._keep_last :], *(step for _, step in best[-self._keep_best :])}

    def _is_measured(self, step: int) -> bool:
        if step not in self.metrics:
            try:
                checkpoint = find_checkpoint(str(self._directory / f"checkpoint_{step}"))
                self.metrics[step] = stored.read_metadata(checkpoint).get("metrics", {})
            except Exception:  # whatever a broken file makes Orbax raise: it is not among the best
                self.metrics[step] = {}
        return self._best_metric in self.metrics[step]

    def _quality(self, step: int) -> float:
        value = self.metrics[step][self._best_metric]
        return -math.inf if math.isnan(value) else self._sign * value


def ensure_writable(directory: str, dry_run: bool = False) -> None:
    """Makes the folder if needed, and checks that files can be made in it.

    Args:
      directory: local or remote folder.
      dry_run: make nothing: check whether the folder, or the nearest existing one above it, is writable. Remote folders
        are not checked.

    Raises:
      UserError: the folder cannot be made or written to.
    """
    if dry_run:
        _check_permission(directory)
        return
    probe = epath.Path(directory) / f".writable-{jax.process_index()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # OSError of a disk; clients of remote stores have kinds of their own
        said = str(getattr(error, "strerror", None) or error).strip().rstrip(".")
        raise UserError(
            f"Cannot write to {directory}: {said}. Choose another folder (MODEL_DIR), or make this one writable."
        ) from error


def _check_permission(directory: str) -> None:
    path = pathlib.Path(directory).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if "://" not in directory and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        state = "cannot be written to" if there.is_dir() else "is a file"
        raise UserError(f"Cannot write to {directory}: {there} {state}. Choose another folder.")


def steps(directory: str) -> list[int]:
    """Returns the steps of the finished checkpoints in a folder of `checkpoint_<step>` folders, ascending."""
    return [found.step for found in stored.find_all(epath.Path(directory))]


def latest(directory: str) -> str | None:
    """Returns the newest finished checkpoint in a folder of `checkpoint_<step>` folders; None if there is none."""
    return next((str(found.path) for found in reversed(stored.find_all(epath.Path(directory)))), None)


class OpenCheckpoint:
    """A checkpoint on disk. Each part is verified and parsed once, when it is first needed.

    Args:
      path: the checkpoint's folder.
      named: the path that the user gave for it, such as a MODEL_DIR.
    """

    def __init__(self, path: epath.Path, named: str = ""):
        self.path, self.named = path, named or str(path)
        self._verified: set[str] = set()

    def __str__(self) -> str:
        return str(self.path)

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """The metadata given to `Checkpoints.save`."""
        self.verify("metadata", stored.EVALUATION)
        return stored.read_metadata(self.path, self._manifest)

    @functools.cached_property
    def record(self) -> Record:
        """The record of how the model was trained."""
        return Record.read(self.metadata, str(self.path))

    @property
    def model_dir(self) -> epath.Path:
        """The folder of the run that wrote it."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else self.path.parent

    def verify(self, *items: str) -> None:
        """Compares the files of some items (by default, all) with the manifest; raises a BrokenCheckpoint."""
        if "" in self._verified or (items and self._verified.issuperset(items)):
            return
        stored.check(self.path, *items, found=self._manifest)
        self._verified.update(items or ("",))

    @functools.cached_property
    def _manifest(self) -> tuple[manifest.Entries, str] | None:
        return manifest.read(self.path) if manifest.has_manifest(self.path) else None


AnyCheckpoint = str | os.PathLike | OpenCheckpoint
"""A user's path (see `find_checkpoints`, whose latest is meant), or a checkpoint that is open."""


def open_checkpoint(checkpoint: AnyCheckpoint) -> OpenCheckpoint:
    """Opens the checkpoint at a user's path; an open checkpoint is returned as it is."""
    if isinstance(checkpoint, OpenCheckpoint):
        return checkpoint
    return OpenCheckpoint(find_checkpoint(os.fspath(checkpoint)), os.fspath(checkpoint))


def find_checkpoint(path: str) -> epath.Path:
    """Returns the folder `checkpoint_<step>` that a user's path means: the latest of `find_checkpoints`."""
    return find_checkpoints(path)[-1]


def find_checkpoints(path: str) -> list[epath.Path]:
    """Returns the folders `checkpoint_<step>` that a user's path means, by ascending step.

    Args:
      path: a checkpoint folder, a folder of checkpoints, or a MODEL_DIR with a folder `checkpoints`.

    Raises:
      UserError: no finished checkpoint is there.
    """
    given = epath.Path(path).expanduser().resolve()
    if any(found.path == given for found in stored.find_all(given.parent)):
        return [given]
    for folder in (given, given / "checkpoints"):
        if found := stored.find_all(folder):
            return [checkpoint.path for checkpoint in found]
    beside = ", ".join(map(str, steps(given.parent)))
    there = f" The folder has the steps {beside}." if beside else ""
    state = "holds no finished checkpoint" if given.exists() else "does not exist"
    raise UserError(
        f"No checkpoint at {path}: it {state}.{there} Give a folder checkpoint_<step>, a folder of such folders, or a "
        "MODEL_DIR with `checkpoints` in it."
    )


def read_metadata(path: AnyCheckpoint) -> dict[str, Any]:
    """Returns the metadata of a checkpoint."""
    return open_checkpoint(path).metadata
