"""Quiet for short calls into native libraries that log to standard error and have no switch for it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def silent_stderr(noise: bytes = b"") -> Iterator[None]:
    """Drops lines with `noise` in them, by default all, that are written to standard error meanwhile.

    For calls whose failures are exceptions. Other lines are written at the end.
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
