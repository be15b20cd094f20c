"""Records as JSON lines, written one by one and gone on with where an earlier run stopped."""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from diffusion_t5x.errors import UserError
from diffusion_t5x.records import write_json
from diffusion_t5x.training.progress import Progress


class RecordFile:
    """A file of records, with a note of the settings that they were made with beside it.

    Args:
      path: the file, which need not be there.
      settings: what has to be the same for an earlier run to be gone on with.

    Attributes:
      path: the file.
      done: how many records an earlier run has written.

    Raises:
      UserError: the file was begun with other settings.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
        self.path, self._settings = path, settings
        self._note = path.with_suffix(".settings.json")
        self.done = 0
        if path.exists():
            before = json.loads(self._note.read_text(encoding="utf-8")) if self._note.exists() else {}
            if changed := [name for name in settings if before.get(name) != settings[name]]:
                raise UserError(
                    f"{path} was begun with other settings ({', '.join(changed)}; see {self._note}). "
                    "Choose another INFER_OUTPUT_DIR, or remove that file."
                )
            self.done = path.read_bytes().count(b"\n")

    def write(self, records: Iterable[Mapping[str, Any]], total: int, title: str) -> None:
        """Appends records, but for those whose "example_id" says that they are there; the first process alone writes.

        Args:
          records: in order.
          total: how many the file will have.
          title: of the bar that shows how far it is.
        """
        if jax.process_index():
            for _ in records:  # made by all processes together
                pass
            return
        write_json(self._note, self._settings)
        if self.path.exists():
            with self.path.open("r+b") as file:  # a line that was cut short
                file.truncate(file.read().rfind(b"\n") + 1)
        with self.path.open("a", encoding="utf-8") as file, Progress(total, self.done, title, "example") as bar:
            for record in records:
                if record["example_id"] >= self.done:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
                    bar.update(record["example_id"] + 1)

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that are there."""
        with self.path.open(encoding="utf-8", newline="\n") as file:
            yield from map(json.loads, file)
