"""Reads T5X's own checkpoints, in its format before Orbax.

Such a folder has a msgpack file `checkpoint`: a tree of arrays, some of them in the file and others in zarr arrays
beside it (github.com/google-research/t5x, checkpoints.py).
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any, Self, cast

import numpy as np
import tensorstore
from flax import serialization

from diffusion_t5x.errors import UserError

_FILE = "checkpoint"
_TARGET = "optimizer/target/"
_DTYPES = ("float32", "bfloat16", "float16")
_DENSEST = 2048  # how many times its size a compressed file may hold; gzip, which T5X has, reaches 1,032
_ALWAYS = 1 << 24  # any file may hold this many bytes


@dataclasses.dataclass(frozen=True)
class T5XCheckpoint:
    """A checkpoint whose parameters have not been read, except for small ones inside the msgpack file.

    Attributes:
      path: path of the folder.
      tensors: parameters by "/"-joined name, as numpy or tensorstore arrays.
      dropped: shapes of everything else in the checkpoint, such as the optimizer's arrays, by name.
    """

    path: pathlib.Path
    tensors: dict[str, np.ndarray | tensorstore.TensorStore]
    dropped: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: str) -> Self:
        """Reads the msgpack file and the headers of the parameters' zarr arrays.

        Raises:
          UserError: a file is missing, broken, outside of the folder or not in this format, or a parameter has another
            dtype.
        """
        folder = pathlib.Path(path).expanduser().resolve()
        tensors, dropped = {}, {}
        for name, leaf in _leaves(_read_msgpack(folder / _FILE)):
            if name.startswith(_TARGET):
                name = name.removeprefix(_TARGET)
                tensors[name] = _open(folder, name, leaf)
            else:
                dropped[name] = _shape(leaf)
        if not tensors:
            raise UserError(f"{folder / _FILE} is not a T5X checkpoint: it has no {_TARGET}.")
        return cls(folder, tensors, dropped)

    def read(self, name: str, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """Reads an array, see `weights.Source`. Raises a UserError if a file of the array is broken."""
        piece = self.tensors[name][(slice(None),) * axis + (slice(start, stop),)]
        try:
            return np.asarray(piece, np.float32)
        except ValueError as error:
            raise UserError(f"{self.path}: cannot read {name}: {_shortly(error)}.") from error


def _read_msgpack(file: pathlib.Path) -> Any:
    try:
        content = file.read_bytes()
    except OSError as error:
        others = sorted(path.parent.name for path in file.parent.glob(f"checkpoint_*/{_FILE}"))
        hint = f" Name one of the checkpoints in it, such as {others[-1]}." if others else ""
        raise UserError(f"Cannot read {file}: {error.strerror}.{hint}") from error
    try:
        return serialization.msgpack_restore(content)
    except Exception as error:  # of msgpack, numpy or flax, whatever broke
        raise UserError(f"{file} is broken, or not a T5X checkpoint: {error}.") from error


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dicts by "/"-joined name; a description of a zarr array is a leaf."""
    if isinstance(tree, dict) and not _is_zarr(tree):
        for name, branch in tree.items():
            yield from _leaves(branch, f"{prefix}/{name}" if prefix else str(name))
    else:
        yield prefix, tree


def _is_zarr(leaf: Any) -> bool:
    return isinstance(leaf, dict) and isinstance(leaf.get("driver"), str)


def _shape(leaf: Any) -> tuple[int, ...]:
    """Returns the shape of an array according to the msgpack file; () for anything else."""
    if _is_zarr(leaf):
        metadata = leaf.get("metadata")
        shape = metadata.get("shape") if isinstance(metadata, dict) else None
        return tuple(shape) if isinstance(shape, list | tuple) else ()
    return leaf.shape if isinstance(leaf, np.ndarray) else ()


def _open(folder: pathlib.Path, name: str, leaf: Any) -> np.ndarray | tensorstore.TensorStore:
    array: np.ndarray | tensorstore.TensorStore
    if _is_zarr(leaf):
        array = opened = _open_zarr(folder, name, leaf)
        dtype = opened.dtype.name
    elif isinstance(leaf, np.ndarray):
        array, dtype = leaf, leaf.dtype.name
    else:
        raise UserError(f"{folder}: {name} is not an array, but {str(leaf)[:60]!r}.")
    if dtype not in _DTYPES:
        raise UserError(f"{folder}: {name} is {dtype}; only {', '.join(_DTYPES)} are supported.")
    return array


def _open_zarr(folder: pathlib.Path, name: str, spec: dict[str, Any]) -> tensorstore.TensorStore:
    """Opens a zarr array. Only its path is taken from the checkpoint, and must stay in the folder."""
    kvstore = spec.get("kvstore")  # where tensorstore has the path since 0.1.14
    said = (spec | (kvstore if isinstance(kvstore, dict) else {})).get("path")
    if spec["driver"] != "zarr" or not isinstance(said, str):
        raise UserError(f"{folder}: {name} is not a zarr array with a path, but {str(spec)[:60]}.")
    try:
        path = (folder / said).resolve()
        if path == folder or not all(file.resolve().is_relative_to(folder) for file in (path, *path.rglob("*"))):
            raise UserError(f"{folder}: the array {name} lies outside the checkpoint's folder, in {said!r}.")
        opened = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}
        array = tensorstore.open(opened, read=True, open=True).result()
        _check_room(folder, name, array, path, said)
        is_whole = array.storage_statistics(query_fully_stored=True).result().fully_stored
    except ValueError as error:
        raise UserError(f"{folder}: cannot read the array {name} in {said!r}: {_shortly(error)}.") from error
    if not is_whole:
        raise UserError(f"{folder}: files of the array {name} are missing in {said!r}.")
    if array.shape != _shape(spec):
        raise UserError(f"{folder}: {name} has the shape {array.shape}, and {_FILE} says {_shape(spec)}.")
    return array


def _check_room(folder: pathlib.Path, name: str, array: tensorstore.TensorStore, path: pathlib.Path, said: str) -> None:
    """Raises a UserError if an array is larger than its files can contain, before its chunks are visited."""
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    chunk = cast("tuple[int, ...]", array.chunk_layout.read_chunk.shape)  # Zarr always says it
    chunks = math.prod(-(-size // max(1, part)) for size, part in zip(array.shape, chunk, strict=True))
    if chunks > len(sizes):
        raise UserError(f"{folder}: files of the array {name} are missing in {said!r}.")
    for shape, stored in ((array.shape, sum(sizes)), (chunk, max(sizes, default=0))):
        if (held := math.prod(shape) * array.dtype.numpy_dtype.itemsize) > max(_ALWAYS, _DENSEST * stored):
            raise UserError(
                f"{folder}: {name} should have {held:,} bytes, which files of {stored:,} bytes cannot contain."
            )


def _shortly(error: ValueError) -> str:
    """Returns an error's text without the settings that tensorstore adds."""
    return str(error).split(" [")[0]
