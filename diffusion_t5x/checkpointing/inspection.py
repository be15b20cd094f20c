"""Lists the contents of checkpoints and compares two of them. Arrays are read one at a time."""

import dataclasses
import datetime
import difflib
from typing import Any

import jax
import numpy as np
from etils import epath

from diffusion_t5x.checkpointing import manifest, stored
from diffusion_t5x.checkpointing.checkpoints import find_checkpoint, find_checkpoints

_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Listed:
    """A checkpoint in a list.

    Attributes:
      path: the checkpoint's folder.
      step: number of training steps.
      size: size of all its files, in bytes.
      written: when it was complete; None if unknown.
      faults: what is wrong with its files, judged only by size; None if it has no manifest to compare with.
      metrics: metrics of the checkpoint's evaluation.
      newest, best: True if it is the newest or best checkpoint without faults; best by the metric that the run keeps
        the best by.
    """

    path: epath.Path
    step: int
    size: int
    written: datetime.datetime | None
    faults: list[str] | None
    metrics: dict[str, float]
    newest: bool = False
    best: bool = False


@dataclasses.dataclass(frozen=True)
class ArrayDifference:
    """Difference of an array between two checkpoints.

    Attributes:
      name: name of the array.
      first, second: dtype and shape in each; None if it is missing.
      largest: largest absolute difference of two elements; None unless shapes and dtypes are equal.
      relative: norm of the difference over the norm of the first array; None unless shapes and dtypes are equal.
    """

    name: str
    first: str | None
    second: str | None
    largest: float | None = None
    relative: float | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """The differences between two checkpoints.

    Attributes:
      arrays: the arrays that differ.
      num_equal: number of arrays that are equal, bit for bit.
      metadata: names of the metadata that differ, with both values; None for a missing one.
      config: a unified diff of the operative gin.
    """

    arrays: list[ArrayDifference]
    num_equal: int
    metadata: dict[str, tuple[Any, Any]]
    config: list[str]

    def __bool__(self) -> bool:
        return bool(self.arrays or self.metadata or self.config)


def listing(run: str) -> list[Listed]:
    """Returns the checkpoints at a user's path (see `find_checkpoints`), by ascending step."""
    found = [_listed(path) for path in find_checkpoints(run)]
    whole = [listed for listed in found if not listed.faults]
    newest = whole[-1:]
    best: list[Listed] = []
    for listed in whole:
        match manifest.notes(listed.path).get("custom_metadata", {}).get("best"):
            case [str(metric), mode]:
                value = listed.metrics.get(metric, np.nan)
            case _:
                continue
        if not np.isnan(value):
            better = not best or (value > best[0].metrics[metric] if mode == "max" else value < best[0].metrics[metric])
            best = [listed] if better else best
    return [dataclasses.replace(listed, newest=listed in newest, best=listed in best) for listed in found]


def faults(checkpoint: epath.Path) -> list[str] | None:
    """Returns the problems of a checkpoint's files; reads all of them.

    None if it is older than manifests and can be read completely.
    """
    found = stored.faults(checkpoint)
    if found is not None:
        return found
    try:
        for name in stored.leaves(checkpoint):
            _read(checkpoint, name)
        stored.read_metadata(checkpoint)
        if (checkpoint / "data").exists():
            stored.read_tree(checkpoint, "data")
    except Exception as error:  # whatever a broken file makes Orbax raise
        return [f"it cannot be read ({(str(error).splitlines() or [repr(error)])[0][:200]})"]
    return None


def arrays(checkpoint: epath.Path) -> dict[str, str]:
    """Returns dtype and shape of every array by name, such as "float32[16, 8]"."""
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in stored.leaves(checkpoint).items()}


def difference(first: str, second: str) -> Difference:
    """Compares the checkpoints at two users' paths (see `find_checkpoint`), which must both be whole.

    Raises:
      UserError: no checkpoint, or a broken one.
    """
    folders = find_checkpoint(first), find_checkpoint(second)
    for folder in folders:
        stored.check(folder)
    kinds = [arrays(folder) for folder in folders]
    found = [_array_difference(name, folders, kinds) for name in sorted(kinds[0] | kinds[1])]
    metadata = [stored.read_metadata(folder) for folder in folders]
    before, after = (values.pop("config", "").splitlines() for values in metadata)
    names = map(str, folders)
    return Difference(
        arrays=[array for array in found if array],
        num_equal=found.count(None),
        metadata={
            name: (metadata[0].get(name), metadata[1].get(name))
            for name in sorted(metadata[0] | metadata[1])
            if metadata[0].get(name) != metadata[1].get(name)
        },
        config=list(difflib.unified_diff(before, after, next(names), next(names), n=0, lineterm="")),
    )


def _listed(path: epath.Path) -> Listed:
    names = manifest.files(path)
    problems = stored.faults(path, checksums=False)
    return Listed(
        path=path,
        step=int(path.name.rpartition("_")[2]),
        size=sum((path / name).stat().length for name in names if manifest.is_file(path / name)),
        written=_written(path),
        faults=problems,
        metrics={} if problems else stored.read_metadata(path).get("metrics", {}),
    )


def _written(checkpoint: epath.Path) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromtimestamp(manifest.notes(checkpoint)["commit_timestamp_nsecs"] / 1e9).astimezone()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


def _array_difference(name: str, folders: tuple[epath.Path, epath.Path], kinds: list[dict]) -> ArrayDifference | None:
    first, second = (kind.get(name) for kind in kinds)
    if first != second:
        return ArrayDifference(name, first, second)
    a, b = (np.ravel(_read(folder, name)) for folder in folders)
    if a.tobytes() == b.tobytes():
        return None
    largest, squares, norm = 0.0, 0.0, 0.0
    for start in range(0, a.size, _CHUNK):  # in double precision, a piece at a time
        x, y = (np.asarray(array[start : start + _CHUNK], np.float64) for array in (a, b))
        largest = np.maximum(largest, np.max(np.abs(x - y)))  # NaN stays NaN
        squares, norm = squares + np.sum((x - y) ** 2), norm + np.sum(x**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.sqrt(squares) / np.sqrt(norm)
    return ArrayDifference(name, first, second, float(largest), float(relative))


def _read(checkpoint: epath.Path, name: str) -> np.ndarray:
    leaf = stored.leaves(checkpoint)[name]
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}
    return np.asarray(stored.read_arrays(checkpoint, target, {name: name})[name])
