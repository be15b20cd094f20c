"""Records as JSON lines, written one by one; a repeated run continues where the last one stopped."""

import contextlib
import fcntl
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, NoReturn

import jax

from diffusion_t5x import json_lines
from diffusion_t5x.errors import UserError
from diffusion_t5x.progress import Progress
from diffusion_t5x.records import write_json

logger = logging.getLogger(__name__)
# What a record keeps of its example, whatever the mode.
_EXAMPLE = ("inputs_pretokenized", "targets_pretokenized", "template")


class RecordFile:
    """A file of records, with a file next to it that notes the settings that made them.

    Args:
      path: the file, which need not exist.
      settings: settings that must be equal to continue an earlier run.

    Attributes:
      path: the file.
      done: number of records that an earlier run wrote.

    Raises:
      UserError: the file was started with different settings, or has no note.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
        self.path, self._settings = path, settings
        self._note = path.with_suffix(".settings.json")
        self.done = 0
        if path.exists() and (done := path.read_bytes().count(b"\n")):
            before = self._read_note()
            if changed := [name for name in settings if before.get(name) != settings[name]]:
                raise UserError(
                    f"{path} was started with different settings ({', '.join(changed)}; see {self._note}). "
                    "Choose another INFER_OUTPUT_DIR, or remove that file."
                )
            self.done = done

    def _read_note(self) -> Mapping[str, Any]:
        try:
            before = json_lines.parse(self._note.read_bytes())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"{self.path} exists, but {self._note}, which records its settings, cannot be read ({reason}): "
                "remove both, or choose another INFER_OUTPUT_DIR."
            ) from error
        return before if isinstance(before, dict) else {}

    def check_examples(self, examples: Iterable[Mapping[str, Any]]) -> None:
        """Compares the existing records with the examples that they were made from.

        Raises:
          UserError: an example has changed, or there are fewer now: old and new records would not match.
        """
        found = iter(examples)
        for number, record in enumerate(self.read()):
            example = next(found, None)
            if example is None:
                self._refuse(f"has {self.done} records, but the data have {number} examples now")
            if _said(record) != _said(example):
                self._refuse(f"was started with different data: example {number} has changed")

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self.path} {reason}. Remove that file, or choose another INFER_OUTPUT_DIR.")

    def write(self, records: Iterable[Mapping[str, Any]], total: int, title: str) -> None:
        """Appends records, except those whose "example_id" exists already; only the first process writes.

        Args:
          records: in order.
          total: final number of records in the file.
          title: title of the progress bar.

        Raises:
          UserError: another process writes to the file.
        """
        if jax.process_index():
            for _ in records:  # made by all processes together
                pass
            return
        with self.path.open("a+b") as locked, _lock(locked, self.path):
            content = self.path.read_bytes()
            locked.truncate(content.rfind(b"\n") + 1)  # a line that was cut short
            if content.count(b"\n") != self.done:
                self._refuse("was written to by another process since this one started")
            write_json(self._note, self._settings)
            with self.path.open("a", encoding="utf-8") as file, Progress(total, self.done, title, "example") as bar:
                for record in records:
                    if record["example_id"] >= self.done:
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")
                        file.flush()
                        bar.update(record["example_id"] + 1)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yields the existing records; only complete lines.

        Raises:
          UserError: a line is not a record.
        """
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.endswith("\n"):
                    try:
                        yield json_lines.parse_object(line)
                    except ValueError as error:
                        raise UserError(f"{self.path}:{number}: {error}. Remove that file to start over.") from error


def _said(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in _EXAMPLE if name in record}


@contextlib.contextmanager
def _lock(file: IO[Any], path: pathlib.Path) -> Iterator[None]:
    """Locks an open file; the kernel releases the lock when the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path} is being written by another process: wait for it, or choose another INFER_OUTPUT_DIR."
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no other run writes there", path, error)
    yield
