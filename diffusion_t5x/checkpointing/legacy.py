"""Makes the record of a checkpoint that is older than records, from the gin text in its metadata.

The text is read and never executed. It is what `config.operative_text` or an import wrote: statements `name = value`,
values continued on indented lines, blocks `selector:` of indented statements, imports and includes.
"""

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.sampling import Sampling
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.joint import Joint
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.task_modules import registers_tasks

_OBJECTIVES = (Autoregressive, Sundae, Masked, Block, Joint, Distillation)
_DECODERS = (
    AutoregressiveDecoder, BeamSearchDecoder, SundaeDecoder, MaskedDecoder, BlockDecoder, SelfSpeculationDecoder,
)  # fmt: skip
_CLASSES = {cls.__name__: cls for cls in (ModelConfig, SeqioDataset, Sampling, *_OBJECTIVES, *_DECODERS)}
_QUOTED_OR_REFERENCE = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|([@%])([\w./]+)(\(\))?""")


@dataclasses.dataclass(frozen=True)
class Said:
    """Training settings found in a gin text; None or empty if the text does not set them.

    Attributes:
      model, objective: the model and objective of the training.
      decoder: the decoder of its evaluations.
      dataset: fields of the training's `SeqioDataset`.
      task: see `Record.task`.
      vocabulary_file: the vocabulary file of an imported model.
      imported: True if an import wrote the text.
    """

    model: ModelConfig | None
    objective: Any
    decoder: Any
    dataset: Mapping[str, Any] | None
    task: Mapping[str, Any] | None
    vocabulary_file: str | None
    imported: bool


def read(text: str) -> Said:
    """Reads the text of a checkpoint's metadata."""
    gin = _Gin(text)
    trained = any("train.train." in name for name in gin.values)
    objective = gin.made("train.train.objective", "OBJECTIVE")
    model = gin.made("train.train.model", "MODEL")
    # Objectives had this setting before models did.
    if model and gin.fields([], type(getattr(objective, "diffusion", objective)).__name__).get("shifted") is True:
        model = dataclasses.replace(model, shifted=True)
    return Said(
        model=model,
        objective=objective,
        decoder=gin.made("DECODER"),
        dataset=gin.described("train.train.train_dataset"),
        task=gin.task() if trained else None,
        vocabulary_file=None if trained else gin.found("VOCABULARY_FILE") or gin.found("TOKENIZER_FILE"),
        imported=bool(gin.values) and not trained,
    )


class _Gin:
    """The statements of a gin text.

    Attributes:
      values: values by name as spelled. A reference is {"@": name, "call": bool}, a macro {"%": name}.
      modules: the imported modules by their names in the text.
    """

    def __init__(self, text: str):
        self.values = {name: _value(value) for name, value in _statements(text)}
        self.modules = {}
        for package, module, alias in re.findall(r"^(?:from ([\w.]+) )?import ([\w.]+)(?: as (\w+))?$", text, re.M):
            self.modules[alias or module] = f"{package}.{module}" if package else module
        if included := re.search(r'^include "models/(\w+)\.gin"$', text, re.M):  # an import's text
            self.values.setdefault("MODEL", {"@": "ModelConfig", "call": True})
            self.values.setdefault("ModelConfig.architecture", included[1])

    def found(self, name: str) -> Any:
        """Returns the value of a macro or parameter, by the end of its name, with macros in it replaced."""
        ends = (value for key, value in self.values.items() if f".{key}".endswith(f".{name}") and "/" not in key)
        return self._resolved(next(ends, None))

    def made(self, *names: str) -> Any:
        """Returns the object that the first bound one of these names refers to; None if its class is unknown here."""
        value = next((value for value in map(self.found, names) if value is not None), None)
        return self._made(value, []) if _is_reference(value) else None

    def described(self, name: str) -> dict[str, Any] | None:
        """Returns class and fields of what `made` would return, without making it."""
        reference = self.found(name)
        if not _is_reference(reference) or (cls := self._class(reference)) is None:
            return None
        *scopes, _ = reference["@"].split("/")
        values = {name: self._resolved(value) for name, value in self.fields(scopes, cls.__name__).items()}
        return {"class": f"{cls.__module__}.{cls.__qualname__}"} | values

    def fields(self, scopes: Sequence[str], class_name: str) -> dict[str, Any]:
        """Returns the values that a class's fields have in a scope."""
        found = {}
        for depth in range(len(scopes) + 1):
            scope = "/".join(scopes[:depth])
            for name, value in self.values.items():
                selector, _, field = name.rpartition(".")
                where, _, selector = selector.rpartition("/")
                if where == scope and selector.rpartition(".")[2] == class_name:
                    found[field] = value
        return found

    def task(self) -> dict[str, Any]:
        """Returns what MIXTURE_OR_TASK_NAME needs, see `config.registration`."""
        wanted, found = ["MIXTURE_OR_TASK_NAME"], {}
        while wanted:
            name = wanted.pop()
            for key, value in self.values.items():
                selector = key.rpartition("/")[2]
                if key not in found and (key == name or selector.rpartition(".")[0] == name):
                    found[key] = value
                    wanted += [spelled.rpartition("/")[2] for spelled in _references(value)]
        mentioned = {
            spelled.rpartition("/")[2].partition(".")[0] for value in found.values() for spelled in _references(value)
        }
        modules = {self.modules[name] for name in mentioned & self.modules.keys()}
        modules |= {module for module in self.modules.values() if registers_tasks(module)}
        return {
            "imports": sorted(modules),
            "bindings": {self._full(name): self._full_references(value) for name, value in found.items()},
        }

    def _full(self, name: str) -> str:
        """Returns a name with the module's full name in place of its alias in the text."""
        scope, slash, selector = name.rpartition("/")
        first, dot, rest = selector.partition(".")
        return f"{scope}{slash}{self.modules.get(first, first)}{dot}{rest}" if dot else name

    def _full_references(self, value: Any) -> Any:
        if _is_reference(value):
            return {**value, "@": self._full(value["@"])}
        if isinstance(value, dict):
            return {key: self._full_references(item) for key, item in value.items()}
        return list(map(self._full_references, value)) if isinstance(value, list | tuple) else value

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, dict) and "%" in value:
            return self._resolved(self.values.get(value["%"]))
        if isinstance(value, dict):
            return {key: self._resolved(item) for key, item in value.items()}
        return type(value)(map(self._resolved, value)) if isinstance(value, list | tuple) else value

    def _class(self, reference: Mapping[str, Any]) -> type | None:
        return _CLASSES.get(reference["@"].rpartition("/")[2].rpartition(".")[2])

    def _made(self, reference: Mapping[str, Any], scopes: Sequence[str]) -> Any:
        if (cls := self._class(reference)) is None:
            return None
        *own, _ = reference["@"].split("/")
        scopes = own or scopes
        known = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for name, value in self.fields(scopes, cls.__name__).items():
            if name in known:
                value = self._resolved(value)
                values[name] = self._made(value, scopes) if _is_reference(value) else value
        return cls(**values)


def _is_reference(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and "@" in value


def _references(value: Any) -> Iterator[str]:
    """Yields the names of all references and macros in a value."""
    if isinstance(value, dict):
        yield from (value[sign] for sign in "@%" if isinstance(value.get(sign), str))
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _statements(text: str) -> Iterator[tuple[str, str]]:
    """Yields the statements as names and the texts of their values."""
    found: dict[str, str] = {}
    block, name = "", ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        is_indented, bound = line[0].isspace(), re.match(r"\s*([\w./]+) = (.*)$", line)
        if bound and (not is_indented or block):
            block = block if is_indented else ""
            name = block + bound[1]
            found[name] = bound[2].removesuffix("\\")
        elif is_indented and name:
            found[name] += f" {line.strip()}"
        else:
            name, block = "", f"{line[:-1]}." if line.endswith(":") else ""
    yield from found.items()


def _value(text: str) -> Any:
    """Parses a value; anything that is not one stays text."""

    def plain(match: re.Match) -> str:
        quoted, sign, name, call = match.groups()
        return quoted or repr({"@": name, "call": bool(call)} if sign == "@" else {"%": name})

    try:
        return ast.literal_eval(_QUOTED_OR_REFERENCE.sub(plain, text).strip())
    except (ValueError, SyntaxError):
        return text
