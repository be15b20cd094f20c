"""Text and code that every Python has: the source files of its standard library, about 11 MB."""

import contextlib
import functools
import hashlib
import os
import pathlib
import sysconfig

from diffusion_t5x.errors import UserError

VALIDATION_PERCENT = 2
DOCUMENT_CHARACTERS = 2_000

# Third-party packages, test suites (odd encodings and syntax errors on purpose) and tables of code points.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})


@functools.cache
def files() -> tuple[tuple[str, str], ...]:
    """Returns (name relative to the library's root, text) of every file, ordered by name.

    Raises:
      UserError: this Python has no sources (an embedded or zipped one).
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for path in (pathlib.Path(folder, name) for name in names if name.endswith(".py")):
            with contextlib.suppress(UnicodeDecodeError):
                texts[path.relative_to(root).as_posix()] = path.read_bytes().decode("utf-8")
    if not texts:
        raise UserError(f"No .py files below {root}: the quickstart corpus needs a Python that ships its sources.")
    return tuple(sorted(texts.items()))


def split_of(name: str) -> str:
    """Returns 'train' or 'validation', by a stable hash of the file's name."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "validation" if bucket < VALIDATION_PERCENT else "train"


@functools.cache
def documents(split: str) -> tuple[str, ...]:
    """Returns the files of a split, cut at line ends into pieces of about `DOCUMENT_CHARACTERS`, in the files' order.

    Short documents keep a shuffled reader from dwelling on one file.
    """
    pieces = []
    for name, text in files():
        if split_of(name) == split:
            pieces.extend(_cut(text))
    return tuple(pieces)


def _cut(text: str) -> list[str]:
    pieces, piece, size = [], [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS:
            pieces.append("".join(piece))
            piece, size = [], 0
    return [*pieces, "".join(piece)] if piece else pieces
