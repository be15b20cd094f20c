"""The command line of ar2diff, checked."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from diffusion_t5x.command_line import help_pages
from diffusion_t5x.command_line.gin_reading import shipped
from diffusion_t5x.data import text_files
from diffusion_t5x.errors import UserError, did_you_mean

DataKind = Literal["data", "prompts", "chat"]
_ROUTES = "recipes/ar2diff"
# What the command itself sets, with the flag that changes it.
_ITS_OWN = {
    "MODEL_DIR": "--output",
    "INITIAL_CHECKPOINT_PATH": "MODEL",
    "TEACHER_CHECKPOINT_PATH": "MODEL",
    "VOCABULARY_FILE": "MODEL",
    "FILES": "--data",
    "TRAIN_STEPS": "--tokens",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A conversion, as the command line asks for it.

    Attributes:
      model: as it was named.
      output: absolute path of the folder for everything.
      kind: the flag that named the data.
      files: absolute paths or patterns of the data.
      route: name of a file in recipes/ar2diff; None takes the default of the model's architecture.
      tokens: number of tokens to train on; None uses `minutes`.
      minutes: minutes of training.
      tokenizer: SentencePiece model of a T5X checkpoint.
      bindings: gin, "NAME=VALUE" each.
    """

    model: str
    output: pathlib.Path
    kind: DataKind
    files: tuple[str, ...]
    route: str | None = None
    tokens: int | None = None
    minutes: float = 60.0
    tokenizer: str | None = None
    bindings: tuple[str, ...] = ()

    @property
    def gin_flags(self) -> list[str]:
        """The bindings as flags of a verb."""
        return [f"--gin.{binding}" for binding in self.bindings]

    def describe(self) -> dict[str, Any]:
        """All but the output as JSON-serialisable values, by the name of the flag."""
        return {
            "MODEL": self.model,
            f"--{self.kind}": list(self.files),
            "--route": self.route,
            "--tokens": self.tokens,
            "--minutes": None if self.tokens else self.minutes,
            "--tokenizer": self.tokenizer,
            "--gin": list(self.bindings),
        }


def routes() -> dict[str, str]:
    """The shipped gin file of each route, by the route's name."""
    files = [pathlib.PurePath(file) for file in shipped(_ROUTES)]
    return {file.stem: str(file) for file in files if str(file.parent) == _ROUTES}


def parse(argv: Sequence[str]) -> tuple[Command, bool]:
    """Reads the command line.

    Returns:
      The command, and whether `--plan` asks to stop after the plan.

    Raises:
      UserError: a flag that is wrong or missing, no such file, or no such route.
    """
    bindings = [flag.removeprefix("--gin.") for flag in argv if flag.startswith("--gin.")]
    given = [flag for flag in argv if not flag.startswith("--gin.")]
    flags = help_pages.parser("ar2diff").parse_args(given)
    kind, files = _data(flags)
    for name, value in (("--tokens", flags.tokens), ("--minutes", flags.minutes)):
        if value is not None and value <= 0:
            raise UserError(f"{name} must be above 0, not {value}.")
    if flags.tokens and flags.minutes:
        raise UserError("Give --tokens or --minutes, not both.")
    if flags.route and flags.route not in routes():
        hint = did_you_mean(flags.route, routes()) or f" There are {', '.join(routes())}."
        raise UserError(f"--route={flags.route}: there is no such route.{hint}")
    for binding in bindings:
        name, equals, _ = binding.partition("=")
        if not equals:
            raise UserError(f"--gin.{binding}: write --gin.NAME=VALUE, with an equals sign and no space around it.")
        if name in _ITS_OWN:
            raise UserError(f"--gin.{binding}: ar2diff sets {name} itself. Use {_ITS_OWN[name]}.")
    command = Command(
        model=_absolute(flags.model) if os.path.exists(os.path.expanduser(flags.model)) else flags.model,
        output=pathlib.Path(_absolute(flags.output)),
        kind=kind,
        files=tuple(map(_absolute, files)),
        route=flags.route,
        tokens=flags.tokens,
        minutes=flags.minutes or 60.0,
        tokenizer=flags.tokenizer and _absolute(flags.tokenizer),
        bindings=tuple(bindings),
    )
    text_files.expand(command.files)
    return command, flags.plan


def _data(flags: argparse.Namespace) -> tuple[DataKind, list[str]]:
    kinds: tuple[DataKind, ...] = ("data", "prompts", "chat")
    given = [kind for kind in kinds if getattr(flags, kind)]
    if len(given) != 1:
        raise UserError(
            f"Give the text to train on by one flag, --data, --prompts or --chat, not {' and '.join(given) or 'none'}."
        )
    return given[0], getattr(flags, given[0])


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
