"""Atomic writes: a reader finds the old content or the new one, whatever kills the writer."""

import contextlib
import errno
import json
import os
import pathlib
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from diffusion_t5x.errors import UserError

# Errors of a disk, as opposed to those of what the content is made from.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "w", errors: str = "strict") -> Iterator[IO[Any]]:
    """Context with a file that becomes `path` at the end; after an exception `path` is unchanged.

    It is next to `path`, whose folder is created if missing, is flushed to disk and then renamed; its permissions are
    those of any new file (umask). A symbolic link stays one. A device or pipe, such as /dev/stdout, is written to
    directly.

    Args:
      path: path of the finished file.
      mode: "w" for text (UTF-8, "\\n" stays "\\n"), "wb" for bytes.
      errors: how to treat text that UTF-8 cannot encode, as in `open`.

    Raises:
      UserError: the file cannot be written.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n", "errors": errors}
    if _is_special(path):
        with open(path, mode, **text) as file:
            yield file
        return
    final = pathlib.Path(os.path.realpath(path))
    aside = final.with_name(f".{final.name[:40]}.{secrets.token_hex(4)}.tmp")  # two writers are not in each other's way
    try:
        with _explained(path):
            final.parent.mkdir(parents=True, exist_ok=True)
            file = aside.open(mode.replace("w", "x"), **text)
        with file:
            try:
                yield file
            except OSError as error:
                if error.errno not in _OF_THE_DISK:
                    raise
                with _explained(path):
                    raise
            with _explained(path):
                file.flush()
                os.fsync(file.fileno())
        with _explained(path):
            os.replace(aside, final)
            sync(final.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content` to `path`, atomically (see `replacing`)."""
    with replacing(path, "wb") as file:
        file.write(content)


def write_text(path: str | os.PathLike, text: str, errors: str = "strict") -> None:
    """Writes `text` to `path` as UTF-8, atomically (see `replacing`)."""
    with replacing(path, errors=errors) as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Writes `value` to `path` as JSON that ends in a newline, atomically (see `replacing`)."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_json_lines(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line to `path`, atomically (see `replacing`)."""
    with replacing(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def sync(path: str | os.PathLike) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_special(path: str | os.PathLike) -> bool:
    return os.path.abspath(path).startswith("/dev/") or (os.path.exists(path) and not os.path.isfile(path))


@contextlib.contextmanager
def _explained(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write {os.fspath(path)}: {error.strerror or error}. Make room there, or give another place."
        ) from error
