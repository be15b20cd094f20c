"""The manifest of a checkpoint: size and SHA-256 of every file, to detect truncated, changed and lost files.

It is written before the checkpoint gets its name, so every complete checkpoint has one. It has a SHA-256 of itself.
A file that is added later belongs to the checkpoint once the manifest, which is replaced as a whole, names it.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffusion_t5x import records

FILE = "manifest.json"
# Orbax's notes about the commit, written between the manifest and the name; nothing is restored from them.
NOTES = "_CHECKPOINT_METADATA"
_WRITTEN_LATER = (NOTES, "commit_success.txt")
_CHUNK = 1 << 22
_THREADS = 8
_FINE, _MISSING, _SIZE, _CHANGED = range(4)

Entries = dict[str, dict[str, Any]]


def write(folder: epath.Path) -> None:
    """Writes the manifest of a folder's files once they are on disk."""
    names = [name for name in files(folder) if name not in (FILE, *_WRITTEN_LATER)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(names, pool.map(lambda name: _entry(folder / name), names), strict=True))
    _write(folder, entries)


def add(folder: epath.Path, name: str, content: str) -> None:
    """Adds a small file to a finished checkpoint, or replaces it, atomically even if interrupted.

    Until the new manifest has its name, the file is not a part of the checkpoint.
    """
    entries, _ = read(folder)
    if name in entries:  # else the old manifest would, for a moment, tell of another content
        _write(folder, {other: entry for other, entry in entries.items() if other != name})
    put(folder / name, content)
    _write(folder, entries | {name: _entry(folder / name)})


def put(path: epath.Path, content: str) -> None:
    """Writes a small file atomically; remote stores do that by themselves."""
    if "://" in os.fspath(path):
        path.write_text(content)
    else:
        records.write_text(path, content)


def holds(folder: epath.Path, name: str, found: tuple[Entries, str] | None = None) -> bool:
    """Returns True if a checkpoint's manifest names a file; pass the manifest if it has been `read` before."""
    return name in (found or read(folder))[0]


def files(folder: epath.Path) -> list[str]:
    """Returns the names of all files below a folder, relative to it, sorted. A link to a folder counts as a file."""
    found: list[str] = []
    for path in folder.iterdir():
        is_folder = path.is_dir() and not os.path.islink(path)
        found += [f"{path.name}/{name}" for name in files(path)] if is_folder else [path.name]
    return sorted(found)


def is_file(path: epath.Path) -> bool:
    """True for an ordinary file; to read a device or a pipe might not end."""
    return path.exists() if "://" in os.fspath(path) else os.path.isfile(path)


def has_manifest(checkpoint: epath.Path) -> bool:
    """True if a checkpoint was written with a manifest, even if the manifest is lost. Old ones were written without."""
    return (checkpoint / FILE).exists() or "manifest" in notes(checkpoint).get("custom_metadata", {})


def notes(checkpoint: epath.Path) -> dict:
    """Returns Orbax's notes about the commit of a checkpoint; {} if they cannot be read."""
    try:
        found = json.loads((checkpoint / NOTES).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("custom_metadata", {}), dict) else {}


def faults(
    checkpoint: epath.Path, items: Sequence[str] = (), checksums: bool = True, found: tuple[Entries, str] | None = None
) -> list[str]:
    """Returns the problems of a checkpoint's files, one line each; several processes share the reading.

    Args:
      checkpoint: one that `has_manifest`.
      items: check only these files and folders; all by default.
      checksums: read the files; otherwise only their sizes are compared.
      found: the result of `read`, if it was called before.
    """
    entries, fault = found or read(checkpoint)
    if fault:
        return [fault]
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
    """Flushes a local file, or the names in a local folder, to disk; does nothing for remote ones."""
    if "://" not in os.fspath(path):
        records.sync(path)


def read(folder: epath.Path) -> tuple[Entries, str]:
    """Returns the entries by file, and what is wrong with the manifest itself ("" if nothing is)."""
    try:
        said = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return {}, f"{FILE} is missing"
    except (OSError, ValueError, RecursionError):
        return {}, f"{FILE} cannot be read"
    if not isinstance(said, dict) or set(said) - {"sha256"} != {"files"} or not _are_entries(said["files"]):
        return {}, f"{FILE} cannot be read"
    entries = said["files"]
    if any(name.startswith("/") or ".." in name.split("/") for name in entries):
        return {}, f"{FILE} names files outside of the checkpoint"
    if said.get("sha256", _digest(entries)) != _digest(entries):
        return {}, f"{FILE} was changed (its own SHA-256 differs)"
    return entries, ""


def _are_entries(files: Any) -> bool:
    return isinstance(files, dict) and all(
        "\0" not in name
        and isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        for name, entry in files.items()
    )


def _write(folder: epath.Path, entries: Entries) -> None:
    put(folder / FILE, json.dumps({"files": entries, "sha256": _digest(entries)}, indent=1))


def _digest(entries: Entries) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _entry(path: epath.Path) -> dict[str, Any]:
    """Returns size and checksum of a file, once it is on disk."""
    sync(path)
    return {"size": path.stat().length, "sha256": _sha256(path)}


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _state(path: epath.Path, entry: dict, checksums: bool) -> int:
    try:
        if not is_file(path):
            return _MISSING
        if path.stat().length != entry["size"]:
            return _SIZE
        return _CHANGED if checksums and _sha256(path) != entry["sha256"] else _FINE
    except OSError:
        return _MISSING


def _describe(checkpoint: epath.Path, name: str, entry: dict, state: int) -> str:
    if state == _SIZE:
        return f"{name} has {(checkpoint / name).stat().length:,} bytes, not {entry['size']:,}"
    return f"{name} is missing or cannot be read" if state == _MISSING else f"{name} was changed (SHA-256 differs)"
