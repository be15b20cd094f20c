"""Reads gin files: records where each value was set, which of two values stays, and which files may be included."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, Literal

from gin import config as gin_config  # what parses and binds is not part of gin's interface
from gin import config_parser

from diffusion_t5x.command_line.setting_types import WholeNumber, shortened
from diffusion_t5x.errors import UserError

SHIPPED = pathlib.Path(__file__).parents[1] / "gin"
_WHOLE_NUMBER = re.compile(r"-?\d[\d_]*[eE]\+?\d+")  # 1e6, and not 1.0e6 or 1e-6
_CHECKPOINT = re.compile(r"checkpoints|checkpoint_\d+")
Key = tuple[str, str, str]  # scope, selector, parameter

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """The place where a value was set.

    Attributes:
      kind: "text" is gin that nobody named, such as a checkpoint's; "file" is a gin file; "flag" is the command line.
      given: the file as the command line names it, the flag, or a description of the text.
      file, line: the statement's file and line, if it is in a file.
      open_files: real paths of that file and of the files that include it, outermost first.
    """

    kind: Literal["text", "file", "flag"]
    given: str
    file: str = ""
    line: int = 0
    open_files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{_readable(self.file)}:{self.line}" if self.file else self.given

    @property
    def is_vouched(self) -> bool:
        """True if the value comes from a trusted source: a shipped file or the user."""
        return self.kind == "flag" or (self.kind == "file" and is_vouched(self.file))

    @property
    def is_default(self) -> bool:
        """True if the value is from one of the shipped run files, which set defaults."""
        return (SHIPPED / "runs").resolve() in pathlib.Path(self.file).resolve().parents


def shipped(folder: str = "") -> list[str]:
    """Returns the gin files that come with the package, relative to its gin folder."""
    root = SHIPPED
    return sorted(str(path.relative_to(root)) for path in (root / folder).rglob("*.gin"))


def shipped_text(file: str) -> str:
    return (SHIPPED / file).read_text(encoding="utf-8")


class Spelled(str):
    """Gin text that appears in a value without quotes."""

    __repr__ = str.__str__


class AsText(config_parser.ParserDelegate):
    """Keeps references and macros as they are spelled, and collects what they refer to, without scopes."""

    def __init__(self) -> None:
        self.mentioned: list[str] = []

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Spelled:
        self.mentioned.append(scoped_selector.rpartition("/")[2])
        return Spelled(f"@{scoped_selector}{'()' if evaluate else ''}")

    def macro(self, macro_name: str) -> Spelled:
        return Spelled(f"%{macro_name}")


class _Reading:
    """The source being read, and the places where all values so far were set."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.places: dict[Key, Place] = {}
        self.replaced: dict[Key, Any] = {}
        self.now = Place("text", "gin")
        self.open_files: list[str] = []
        self.vouched: dict[pathlib.Path, bool] = {}


_reading = _Reading()


def start() -> None:
    """Resets all state, and makes gin read files by this module's rules."""
    _reading.forget()
    config_parser.ConfigParser = _Parser
    gin_config.bind_parameter = _bind
    gin_config._FILE_READERS[:] = [(_opened, os.path.isfile)]


@contextlib.contextmanager
def reading(kind: Literal["text", "file", "flag"], given: str) -> Iterator[None]:
    """Context that attributes everything read inside it to this source."""
    before, _reading.now = _reading.now, Place(kind, given)
    try:
        yield
    finally:
        _reading.now = before


def place(key: Key) -> Place:
    """Returns the place where a bound value was set."""
    return _reading.places.get(key, Place("text", "gin"))


def set_by_flags() -> dict[Key, Place]:
    """Returns the values that were set on the command line."""
    return {
        (scope, selector, name): found
        for (scope, selector, name), found in _reading.places.items()
        if found.kind == "flag" and name in gin_config._CONFIG.get((scope, selector), {})
    }


def set_by_files() -> dict[Key, Place]:
    """Returns the values that stand as gin files set them, those of the command line and what they include."""
    return {key: found for key, found in _reading.places.items() if found.kind == "file"}


def replaced_by_flags() -> dict[Key, Any]:
    """Returns the values that files set and the command line replaced."""
    return dict(_reading.replaced)


def is_vouched(file: str) -> bool:
    """True unless a gin file lies beside a checkpoint, as those of runs and imports do; such files are not trusted."""
    named, real = pathlib.Path(os.path.abspath(file)), pathlib.Path(os.path.realpath(file))
    if SHIPPED.resolve() in real.parents:
        return True
    if named not in _reading.vouched:  # a link beside a checkpoint may lead to a folder without one
        _reading.vouched[named] = not _lies_beside_checkpoint(named) and not _lies_beside_checkpoint(real)
        _reading.vouched[real] = _reading.vouched[named] and _reading.vouched.get(real, True)
    return _reading.vouched[named] and _reading.vouched[real]


def _lies_beside_checkpoint(path: pathlib.Path) -> bool:
    beside = [path.parent.name, *(entry.name for entry in path.parent.iterdir() if entry.is_dir())]
    return any(map(_CHECKPOINT.fullmatch, beside))


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
    """Opens a gin file. A file must not include itself; untrusted files may include only shipped ones."""
    path, outer = os.path.realpath(file), _reading.open_files[-1:]
    if path in _reading.open_files:
        chain = [*_reading.open_files[_reading.open_files.index(path) :], path]
        raise UserError(f"{_readable(file)} includes itself: {' -> '.join(map(_readable, chain))}. Remove an include.")
    is_trusted = is_vouched(outer[0]) if outer else _reading.now.kind != "text"
    if not is_trusted and SHIPPED.resolve() not in pathlib.Path(path).parents:
        raise PermissionError(
            f"it includes {file}, but what comes with a checkpoint may include shipped gin files only."
        )
    is_vouched(file)  # remembers a link that is not for the file that it leads to
    _reading.open_files.append(path)
    try:
        with open(file, encoding="utf-8") as text:
            yield text
    finally:
        _reading.open_files.pop()


class _Parser(config_parser.ConfigParser):
    """gin's parser, with the current place; keeps numbers such as 1e6 apart from other floats."""

    def parse_statement(self) -> Any:
        statement = super().parse_statement()
        if statement and _reading.now.kind != "flag":
            line = statement.location.line_num
            files = tuple(_reading.open_files)
            _reading.now = dataclasses.replace(_reading.now, file=self._filename or "", line=line, open_files=files)
        if isinstance(statement, config_parser.IncludeStatement) and "://" in statement.filename:
            raise PermissionError(f"it includes {statement.filename}, but gin files are read from disk only.")
        return statement

    def _maybe_parse_basic_type(self) -> tuple[bool, Any]:
        text = self._current_token.string
        found, value = super()._maybe_parse_basic_type()
        is_whole = isinstance(value, float) and _WHOLE_NUMBER.fullmatch(text) and value.is_integer()
        return found, WholeNumber(value) if is_whole else value


def _bind(binding_key: Any, value: Any) -> None:
    """Replaces gin's `bind_parameter`: defaults do not override other files, and flags win in every scope."""
    parsed = gin_config.ParsedBindingKey.parse(binding_key)
    key = (parsed.scope, parsed.complete_selector, parsed.arg_name)
    bound = gin_config._CONFIG.setdefault(parsed.config_key, {})
    before, now = _reading.places.get(key), _reading.now
    if before and parsed.arg_name in bound and _stays(before, bound[parsed.arg_name], now, value):
        return
    if now.kind == "flag":
        _replace_in_scopes(key, now)
        if before and before.kind != "flag" and parsed.arg_name in bound:
            _reading.replaced[key] = bound[parsed.arg_name]
    bound[parsed.arg_name] = value
    _reading.places[key] = now


def _stays(before: Place, value: Any, now: Place, new: Any) -> bool:
    """True if a value stays despite a later one: run files set defaults, whatever the order of the files.

    A run file's value gives way to those of other files, and %gin.REQUIRED to any value. But an included file's value
    gives way to that of the file that includes it.
    """
    if before.kind != "file" or now.kind != "file" or now.open_files[-1] in before.open_files:
        return False
    if repr(value) == "%gin.REQUIRED" or before.is_default:
        return False
    return now.is_default or repr(new) == "%gin.REQUIRED"


def _replace_in_scopes(key: Key, flag: Place) -> None:
    """Removes values that files bind in narrower scopes, where they would win over the flag."""
    scope, selector, parameter = key
    for (other, same), bound in gin_config._CONFIG.items():
        narrower = other != scope and (not scope or other.startswith(f"{scope}/"))
        found = _reading.places.get((other, same, parameter))
        if same == selector and narrower and parameter in bound and found and found.kind != "flag":
            if selector == "gin.macro":
                continue  # a macro's scope is its name
            value = bound.pop(parameter)
            del _reading.places[other, same, parameter]
            name = f"{other}/{'.'.join(selector.split('.')[-2:])}.{parameter}"
            logger.info("%s replaces %s = %s (%s)", flag, name, shortened(value), found)


def _readable(file: str) -> str:
    """Returns a shipped file by its name in the gin folder, other files unchanged."""
    path = pathlib.Path(os.path.realpath(file))
    return path.relative_to(SHIPPED.resolve()).as_posix() if SHIPPED.resolve() in path.parents else file
