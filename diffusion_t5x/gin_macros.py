"""What macros the shipped gin files have: their values, what they are bound to, and what that means by its docstring.

Files are read, not run: no module that they import is imported.
"""

import ast
import dataclasses
import functools
import pathlib
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from gin import config_parser

PACKAGE = pathlib.Path(__file__).parent
REQUIRED = "%gin.REQUIRED"


@dataclasses.dataclass(frozen=True)
class Use:
    """A parameter that a macro is bound to: `data.seqio_source.SeqioDataset.batch_size`, and what it means."""

    parameter: str
    meaning: str


@dataclasses.dataclass
class Macro:
    """A macro of the shipped gin files.

    Attributes:
      name: in capitals.
      values: what each file sets it to, as gin text; `REQUIRED` where the user has to.
      uses: the parameters that it is bound to, the documented ones first.
    """

    name: str
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    uses: list[Use] = dataclasses.field(default_factory=list)

    @property
    def meaning(self) -> str:
        """The docstring's words about the parameter that most files bind it to."""
        meanings = [use.meaning for use in self.uses if use.meaning]
        return max(meanings, key=meanings.count, default="")

    def default(self, files: list[str]) -> str:
        """The value that the last of these files to set it gives; "" if none of them does."""
        return next((self.values[file] for file in reversed(files) if file in self.values), "")


@dataclasses.dataclass
class _File:
    """The statements of one gin file, in their order."""

    imports: dict[str, str]
    includes: list[str]
    values: dict[str, str]
    uses: list[tuple[str, str, str]]  # (macro, selector, parameter)


def files() -> list[str]:
    """The shipped gin files, relative to the gin folder."""
    root = PACKAGE / "gin"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.gin"))


def with_includes(file: str) -> list[str]:
    """A shipped file and all that it includes, in the order in which gin reads them."""
    found = [inner for included in _read(file).includes for inner in with_includes(included)]
    return list(dict.fromkeys([*found, file]))


@functools.cache
def macros() -> Mapping[str, Macro]:
    """All macros of the shipped files, by name."""
    found: dict[str, Macro] = {}
    for name in files():
        file = _read(name)
        for macro, value in file.values.items():
            found.setdefault(macro, Macro(macro)).values[name] = value
        for macro, selector, parameter in file.uses:
            found.setdefault(macro, Macro(macro)).uses.append(_use(file.imports, selector, parameter))
    for macro in found.values():
        macro.uses.sort(key=lambda use: not use.meaning)
    return dict(sorted(found.items()))


def of_runs(run_files: list[str]) -> list[Macro]:
    """The macros that these run files set, those that must be given first."""
    named = list(
        dict.fromkeys(name for file in run_files for inner in with_includes(file) for name in _read(inner).values)
    )
    return sorted((macros()[name] for name in named), key=lambda macro: REQUIRED not in macro.default(run_files))


class _Text(str):
    """Gin text that stands without quotes in a value."""

    __repr__ = str.__str__


class _Reader(config_parser.ParserDelegate):
    """Leaves references and macros as they are spelled."""

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> _Text:
        return _Text(f"@{scoped_selector}{'()' if evaluate else ''}")

    def macro(self, macro_name: str) -> _Text:
        return _Text(f"%{macro_name}")


@functools.cache
def _read(name: str) -> _File:
    """The statements of a shipped file."""
    text = (PACKAGE / "gin" / name).read_text(encoding="utf-8")
    file = _File({}, [], {}, [])
    for statement in config_parser.ConfigParser(text, _Reader()):
        if isinstance(statement, config_parser.ImportStatement):
            file.imports[statement.bound_name()] = statement.module
        elif isinstance(statement, config_parser.IncludeStatement):
            file.includes.append(statement.filename)
        elif isinstance(statement, config_parser.BindingStatement):
            if not statement.arg_name:
                file.values[statement.selector] = repr(statement.value)
            else:
                used = dict.fromkeys(_macros_in(statement.value))
                file.uses += [(macro, statement.selector, statement.arg_name) for macro in used]
    return file


def _macros_in(value: Any) -> Iterator[str]:
    """The names of the macros in a value, at any depth."""
    if isinstance(value, _Text):
        if value.startswith("%") and value != REQUIRED:
            yield value[1:]
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from _macros_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _macros_in(item)


def _use(imports: Mapping[str, str], selector: str, parameter: str) -> Use:
    """A parameter by its full name, with its words in the docstring of what it belongs to."""
    first, _, rest = selector.partition(".")
    module = imports.get(first, first)
    name = f"{module}.{rest}".removeprefix(f"{PACKAGE.name}.")
    documented = _docstring(module, rest)
    return Use(f"{name}.{parameter}", _entry(documented, parameter))


@functools.cache
def _docstring(module: str, name: str) -> str:
    """The docstring of a function or class in a module of this package; "" for those of others."""
    if not module.startswith(f"{PACKAGE.name}."):
        return ""
    path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) or ""
    return ""


def _entry(docstring: str, parameter: str) -> str:
    """What a docstring says of a parameter under "Args:" or "Attributes:", as one line."""
    for section in re.findall(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)+)", docstring, re.MULTILINE):
        for names, text in re.findall(r"^(\w[\w, ]*): (.+(?:\n  .+)*)", textwrap.dedent(section), re.MULTILINE):
            if parameter in names.split(", "):
                return " ".join(text.split())
    return ""
