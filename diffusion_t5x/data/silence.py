"""Silences short calls into native libraries that log to standard error and cannot be configured."""

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def silent_stderr(noise: bytes = b"") -> Iterator[None]:
    """Context that drops lines containing `noise` (by default all lines) from standard error.

    For calls that report failures as exceptions. Other lines are written at the end.
    """
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            if rest := b"".join(line for line in written if noise not in line):
                os.write(2, rest)
