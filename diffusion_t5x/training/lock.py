"""Locks a MODEL_DIR, so that one process trains in it at a time."""

import contextlib
import datetime
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Callable, Iterator

import jax

from diffusion_t5x.checkpointing.checkpoints import ensure_writable
from diffusion_t5x.errors import UserError

FILE = ".lock"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(directory: str) -> Iterator[Callable[[], None]]:
    """Context that holds the lock of a folder, which is created if missing.

    The kernel releases the lock when the process ends, for whatever reason; the file stays and says who had it last. In
    a run of several processes, the first holds it. If the file system has no locks, the log says so.

    Yields:
      A check that raises a UserError if the folder has been removed or renamed since. Remote folders are not checked.

    Raises:
      UserError: another process holds it, the folder cannot be written to, or it was removed in the meantime.
    """
    if jax.process_index() != 0:
        yield lambda: None
        return
    if "://" in directory:
        ensure_writable(directory)
        logger.warning("%s is remote and cannot be locked: make sure that no other run trains there", directory)
        yield lambda: None
        return
    path = pathlib.Path(directory, FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError:
        ensure_writable(directory)  # raises a UserError that says why not
        raise
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{directory} is in use by {file.read().strip() or 'another process'}. Wait for it, stop it, or choose "
                "another MODEL_DIR. Nothing was written."
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): make sure that no other run trains there", directory, error)
        else:
            file.truncate(0)
            since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            file.flush()
        try:
            yield lambda: _check_there(directory)
        except Exception as error:
            if not isinstance(error, UserError):
                _check_there(directory)  # which is then what is behind the error
            raise


def _check_there(directory: str) -> None:
    if not any(os.path.exists(os.path.join(directory, name)) for name in (FILE, "config.gin")):
        raise UserError(
            f"{directory} was removed or renamed while the run was writing to it. Training since its last checkpoint "
            "is lost. Restore the folder, and the same command continues from the newest checkpoint in it."
        )
