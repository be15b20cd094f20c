"""Cheap fingerprints of training data files, to detect changes when a run resumes."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence

import numpy as np

logger = logging.getLogger(__name__)
Fingerprint = Mapping[str, tuple[int, str]]  # by name: bytes, and a hash of the file's two ends

_END = 1 << 12  # bytes of a file that are read at its beginning and at its end
_MOST_NAMES = 1_000  # up to this many files are kept one by one, more of them as one
_SHOWN = 5


def of_files(files: Sequence[str]) -> Fingerprint:
    """Returns the fingerprint of local files; their folder may be moved. Missing files have none."""
    paths = [os.path.abspath(os.path.expanduser(file)) for file in files]
    paths = sorted({path for path in paths if os.path.isfile(path)})
    if not paths:
        return {}
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    found = {os.path.relpath(path, folder): _of_file(path) for path in paths}
    if len(found) <= _MOST_NAMES:
        return found
    whole = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    return {"files": (len(found), ""), "all files": (sum(size for size, _ in found.values()), whole)}


def _of_file(path: str) -> tuple[int, str]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        ends = file.read(_END)
        file.seek(max(size - _END, 0))
        ends += file.read(_END)
    return size, hashlib.sha256(ends).hexdigest()[:16]


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Returns the changes between two fingerprints, a phrase for each file."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            found.append(f"{name} is gone")
        elif name not in before:
            found.append(f"{name} is new")
        elif before[name][0] != now[name][0]:
            found.append(f"{name} had {before[name][0]:,} bytes and has {now[name][0]:,}")
        elif before[name][1] != now[name][1]:
            found.append(f"{name} has other contents")
    return found


def to_bytes(fingerprint: Fingerprint) -> bytes:
    """Returns a fingerprint as JSON, for a checkpoint."""
    return json.dumps(fingerprint).encode()


def warn_of_changes(kept: np.ndarray | None, now: Fingerprint) -> None:
    """Logs what has changed since a checkpoint, if it kept a fingerprint (see `to_bytes`)."""
    before = {} if kept is None else {name: tuple(value) for name, value in json.loads(bytes(kept)).items()}
    found = changes(before, now) if before else []
    if found:
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        logger.warning(
            "the training data have changed since the checkpoint: %s%s. Training continues at the same position in "
            "the new data, so examples may be read twice or not at all",
            "; ".join(found[:_SHOWN]),
            more,
        )
