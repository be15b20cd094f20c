"""The progress of a conversion, DIR/ar2diff.json: the same command continues from it."""

import json
import pathlib
import textwrap
from collections.abc import Mapping
from typing import Any

from diffusion_t5x import records
from diffusion_t5x.errors import UserError

FILE = "ar2diff.json"
_EARLY = {"import", "plan"}  # after these alone a changed command is planned anew


class Journal:
    """The stages that are done, each with what it found. The file is replaced atomically.

    Raises:
      UserError: the folder holds something else, or another command has passed the planning stage there.
    """

    def __init__(self, folder: pathlib.Path, command: Mapping[str, Any]):
        self._path = folder / FILE
        self._command = dict(command)
        self._stages: dict[str, Any] = {}
        if self._path.exists():
            self._read()
        elif folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir()):
            raise UserError(f"{folder} is not empty, and was not created by ar2diff: give another --output.")

    def _read(self) -> None:
        try:
            said = json.loads(self._path.read_bytes())
            before, stages = said["command"], dict(said["stages"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged ({error!r}): remove its folder, or give another --output."
            ) from None
        changed = [key for key in before | self._command if before.get(key) != self._command.get(key)]
        if changed and (stages.keys() - _EARLY or "MODEL" in changed):
            told = (f"{key} was {_said(before.get(key))}, now it is {_said(self._command.get(key))}" for key in changed)
            raise UserError(
                f"{self._path.parent} was started by another command: {'; '.join(told)}. Repeat that one, or give "
                "another --output."
            )
        self._stages = {name: found for name, found in stages.items() if not changed or name == "import"}

    def done(self, stage: str) -> Any:
        """Returns the result of a finished stage; None if it has not finished."""
        return self._stages.get(stage)

    def mark(self, stage: str, found: Any) -> None:
        """Notes that a stage has finished.

        Args:
          stage: its name.
          found: JSON-serialisable, not None.
        """
        self._stages[stage] = found
        records.write_json(self._path, {"command": self._command, "stages": self._stages})


def _said(value: Any) -> str:
    words = map(str, value) if isinstance(value, list) else [] if value is None else [str(value)]
    return textwrap.shorten(" ".join(words), 100, placeholder=" …") or "not given"
