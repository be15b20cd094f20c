"""The manifest of a checkpoint: size and SHA-256 of every file, so that one that was cut, changed or lost is found.

It is written before the checkpoint gets its name, and so a part of what makes one complete.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

FILE = "manifest.json"
# Orbax's notes about the commit, written between the manifest and the name; nothing is restored from them.
NOTES = "_CHECKPOINT_METADATA"
_WRITTEN_LATER = (NOTES, "commit_success.txt")
_CHUNK = 1 << 22
_THREADS = 8
_FINE, _MISSING, _SIZE, _CHANGED = range(4)


def write(folder: epath.Path) -> None:
    """Writes the manifest of all that lies in a folder, when the file system has it on disk."""
    names = [name for name in files(folder) if name not in (FILE, *_WRITTEN_LATER)]

    def entry(name: str) -> dict:
        path = folder / name
        sync(path)
        return {"size": path.stat().length, "sha256": _sha256(path)}

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(names, pool.map(entry, names), strict=True))
    (folder / FILE).write_text(json.dumps({"files": entries}, indent=1))
    sync(folder / FILE)


def files(folder: epath.Path) -> list[str]:
    """The names of all files below a folder, relative to it, sorted."""
    found: list[str] = []
    for path in folder.iterdir():
        found += [f"{path.name}/{name}" for name in files(path)] if path.is_dir() else [path.name]
    return sorted(found)


def has_manifest(checkpoint: epath.Path) -> bool:
    """Whether a checkpoint was written with a manifest, even if that is lost. Older ones were not."""
    return (checkpoint / FILE).exists() or "manifest" in notes(checkpoint).get("custom_metadata", {})


def notes(checkpoint: epath.Path) -> dict:
    """What Orbax noted about the commit of a checkpoint; {} where that cannot be read."""
    try:
        return json.loads((checkpoint / NOTES).read_text())
    except (OSError, ValueError):
        return {}


def read(checkpoint: epath.Path) -> dict[str, dict] | str:
    """Sizes and hashes of the files of a checkpoint that `has_manifest`; or what is wrong with its manifest."""
    try:
        entries = json.loads((checkpoint / FILE).read_text())["files"]
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{FILE} cannot be read"
    if any(name.startswith("/") or ".." in name.split("/") for name in entries):
        return f"{FILE} names files outside of the checkpoint"
    return entries


def faults(
    checkpoint: epath.Path,
    items: Sequence[str] = (),
    checksums: bool = True,
    entries: dict[str, dict] | str | None = None,
) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each; several processes share the reading.

    Args:
      checkpoint: one that `has_manifest`.
      items: only these files and folders of it; all by default.
      checksums: read the files; else only their sizes are compared.
      entries: what `read` returns, if that was called before.
    """
    entries = read(checkpoint) if entries is None else entries
    if isinstance(entries, str):
        return [entries]
    names = sorted(name for name in entries if not items or any(f"{name}/".startswith(f"{item}/") for item in items))
    shares = np.arange(len(names)) % jax.process_count() == jax.process_index()

    def state_of(name: str, mine: bool) -> int:
        return _state(checkpoint / name, entries[name], checksums) if mine else _FINE

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        states = np.array(list(pool.map(state_of, names, shares)), np.int32)
    if jax.process_count() > 1:
        states = np.max(multihost_utils.process_allgather(states), axis=0)
    return [
        _describe(checkpoint, name, entries[name], state) for name, state in zip(names, states, strict=True) if state
    ]


def sync(path: epath.Path) -> None:
    """Returns when a local file, or the names in a local folder, are on disk; does nothing to remote ones."""
    if "://" in os.fspath(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _state(path: epath.Path, entry: dict, checksums: bool) -> int:
    try:
        if path.stat().length != entry["size"]:
            return _SIZE
        return _CHANGED if checksums and _sha256(path) != entry["sha256"] else _FINE
    except OSError:
        return _MISSING


def _describe(checkpoint: epath.Path, name: str, entry: dict, state: int) -> str:
    if state == _SIZE:
        return f"{name} has {(checkpoint / name).stat().length:,} bytes, not {entry['size']:,}"
    return f"{name} is missing or cannot be read" if state == _MISSING else f"{name} was changed (SHA-256 differs)"
