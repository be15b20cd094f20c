"""Settings that the verbs take from a checkpoint, as gin text made from its record.

The text is written here, from typed values whose names are checked. Nothing that a checkpoint holds is read as gin.
"""

import dataclasses
import pathlib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.checkpointing.record import CLASS, Record, is_plain
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.experts import Experts

_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_SCOPED_NAME = re.compile(rf"(?:[A-Za-z_]\w*/)*{_NAME.pattern}")
_RUN_FILE = re.compile(r"--gin_file=(?:.*/)?runs/[^/]+\.gin")
_HEADER = "from __gin__ import dynamic_registration"
_TASK = "MIXTURE_OR_TASK_NAME"
_VARIABLES = "TEMPLATE_VARIABLES"
_VOCABULARY = "diffusion_t5x.data.vocabulary_files.vocabulary"


def checkpoint_texts(
    checkpoint: OpenCheckpoint | None,
    argv: Sequence[str],
    run: str,
    macros: Mapping[str, Any] = types.MappingProxyType({}),
) -> tuple[list[str], dict[str, str]]:
    """Returns the gin text that a verb reads before gin files (see `config.load`), so that a checkpoint is enough.

    Args:
      checkpoint: the checkpoint that the command line names; None reads nothing.
      argv: the command line. Its gin files of runs/ are read first, so the checkpoint's settings win over them.
      run: the gin file to read if it has none of runs/.
      macros: more macros to bind.

    Returns:
      The command line without the files of runs/, and the texts.

    Raises:
      UserError: the checkpoint's metadata cannot be read.
    """
    if checkpoint is None:
        return list(argv), {}
    argv = list(argv)
    while "--gin_file" in argv[:-1]:
        place = argv.index("--gin_file")
        argv[place : place + 2] = [f"--gin_file={argv[place + 1]}"]
    given = [flag for flag in argv if _RUN_FILE.fullmatch(flag)]
    files = [flag.removeprefix("--gin_file=") for flag in given] or [run]
    macros = {"CHECKPOINT_PATH": checkpoint.named, **macros}
    texts = {
        "the run": "\n".join([_HEADER, *(f"include {file!r}" for file in files)]),
        f"the record of {checkpoint}": gin_text(checkpoint),
        "the flags": "\n".join(f"{name} = {value!r}" for name, value in macros.items()),
    }
    return [flag for flag in argv if flag not in given], texts


def gin_text(checkpoint: OpenCheckpoint, with_task: bool = True) -> str:
    """Returns gin text that binds a checkpoint's record to the macros that the files of runs/ use.

    These are MODEL, ARCHITECTURE, READS_START, OBJECTIVE, DECODER, BLOCK_SIZE, BLOCKS_FROM, CANVAS,
    TASK_FEATURE_LENGTHS, MIXTURE_OR_TASK_NAME, CONTEXT_EOS, VOCABULARY, VOCABULARY_FILE, VOCABULARY_SIZE and
    TEMPLATE_VARIABLES. What is not known is not bound.

    Args:
      checkpoint: its metadata is read.
      with_task: bind the task, too, and import the modules that register it.

    Raises:
      UserError: the metadata cannot be read or has no valid record.
    """
    record, text = checkpoint.record, _Text(str(checkpoint))
    if record.model:
        known = {field.name for field in dataclasses.fields(ModelConfig)} - {
            "attention_backend"
        }  # the machine's affair
        model = {name: value for name, value in record.model.items() if name in known}
        text.bind("ARCHITECTURE", model.get("architecture", "decoder_only"))
        model["architecture"] = {"%": "ARCHITECTURE"}
        text.bind("READS_START", model.get("reads_start", True))
        model["reads_start"] = {"%": "READS_START"}
        if isinstance(experts := model.get("experts"), Mapping):
            model["experts"] = {**experts, CLASS: f"{Experts.__module__}.{Experts.__qualname__}"}
        text.bind("MODEL", {CLASS: f"{ModelConfig.__module__}.{ModelConfig.__qualname__}"} | model)
    blocks = next((mode for mode in record.modes if mode.block_size), None)
    if blocks:
        text.bind("BLOCK_SIZE", blocks.block_size)
        text.bind("BLOCKS_FROM", blocks.blocks_from)
    for macro, described in {"OBJECTIVE": record.objective, "DECODER": record.decoder}.items():
        if described and is_plain(described):
            if blocks:
                described = _with_macro(described, "block_size", blocks.block_size, "BLOCK_SIZE")
                described = _with_macro(described, "blocks_from", blocks.blocks_from, "BLOCKS_FROM")
            text.bind(macro, described)
    _bind_data(text, record.dataset or {}, (record.task or {}) if with_task else {})
    if variables := (record.task or {}).get("bindings", {}).get(_VARIABLES):
        text.bind(_VARIABLES, variables)
    if record.imported:
        text.bind("CANVAS", False)
    if record.inputs_end is not None:
        text.bind("CONTEXT_EOS", record.inputs_end)
    _bind_vocabulary(text, record, checkpoint.model_dir)
    return str(text)


def dataset_text(checkpoint: OpenCheckpoint, reader: str) -> str:
    """Returns gin text that binds a run's training data set to a function's argument `dataset`, and RANDOM_SEED.

    Args:
      checkpoint: a checkpoint of the training run.
      reader: full name of the function.

    Raises:
      UserError: the record does not describe the data.
    """
    dataset, text = checkpoint.record.dataset, _Text(str(checkpoint))
    if not dataset:
        raise UserError(f"{checkpoint} does not record the data it was trained on: give the gin files of the run.")
    known = {field.name for field in dataclasses.fields(SeqioDataset)} & dataset.keys()
    macros = {"mixture_or_task_name": _TASK, "task_feature_lengths": "TASK_FEATURE_LENGTHS"}
    macros |= {"architecture": "ARCHITECTURE", "batch_size": "BATCH_SIZE", "seed": "RANDOM_SEED", "canvas": "CANVAS"}
    text.bind("RANDOM_SEED", dataset.get("seed", 0))
    text.bind("BATCH_SIZE", dataset.get("batch_size", 1))
    text.import_all([reader.rpartition(".")[0]])
    values = {name: {"%": macros[name]} if name in macros else dataset[name] for name in known}
    text.bind(f"{reader}.dataset", {CLASS: f"{SeqioDataset.__module__}.{SeqioDataset.__qualname__}"} | values)
    return str(text)


def _bind_data(text: "_Text", dataset: Mapping[str, Any], task: Mapping[str, Any]) -> None:
    """Binds task, lengths and layout of rows."""
    if lengths := dataset.get("task_feature_lengths"):
        text.bind("TASK_FEATURE_LENGTHS", lengths)
    if "canvas" in dataset:
        text.bind("CANVAS", dataset["canvas"])
    text.import_all(task.get("imports", ()))
    for name, value in task.get("bindings", {}).items():
        text.bind(name, value)
    if _TASK not in task.get("bindings", {}) and isinstance(name := dataset.get("mixture_or_task_name"), str):
        text.bind(_TASK, name)


def _bind_vocabulary(text: "_Text", record: Record, folder: pathlib.Path) -> None:
    """Binds the vocabulary and its number of ids."""
    if size := record.vocabulary.get("size"):
        text.bind("VOCABULARY_SIZE", size)
    if arguments := record.vocabulary_arguments(folder):
        text.bind("VOCABULARY_FILE", arguments["file"])
        text.import_all([_VOCABULARY.rpartition(".")[0]])
        text.bind(f"{_VOCABULARY}.file", {"%": "VOCABULARY_FILE"})
        text.bind(f"{_VOCABULARY}.extra_ids", arguments["extra_ids"])
        text.bind("VOCABULARY", {"@": _VOCABULARY, "call": True})


def _with_macro(described: Any, field: str, value: Any, macro: str) -> Any:
    """Returns a described object with a macro in place of this value of a field, also in nested objects."""
    if not isinstance(described, Mapping):
        return described
    return {
        name: {"%": macro} if name == field and item == value else _with_macro(item, field, value, macro)
        for name, item in described.items()
    }


class _Text:
    """A gin text under construction.

    A checkpoint may be a stranger's: anything that should be a name and is not raises a UserError.
    """

    def __init__(self, where: str):
        self._where = where
        self._imports: dict[str, str] = {}
        self._bound: dict[str, str] = {}

    def __str__(self) -> str:
        imports = [(*module.rpartition("."), alias) for module, alias in self._imports.items()]
        return "\n".join(
            [
                _HEADER,
                *(f"from {package} import {name} as {alias}" if dot else f"import {name}"
                  for package, dot, name, alias in imports),
                *(f"{name} = {value}" for name, value in self._bound.items()),
            ]
        )  # fmt: skip

    def import_all(self, modules: Iterable[str]) -> None:
        """Imports modules, each by a name of its own."""
        for module in modules:
            self._imports.setdefault(self._checked(module), module.replace(".", "_"))

    def bind(self, name: str, value: Any) -> None:
        """Binds a macro, or an argument by its full name; see `config.registration` for the values."""
        self._bound[self._spelled(name)] = self._value(value)

    def _made(self, described: Mapping[str, Any]) -> str:
        """Returns a reference to a described object, whose fields are bound, in a scope if its class has bindings."""
        name = self._checked(described[CLASS])
        self.import_all([name.rpartition(".")[0]])
        values = {
            self._checked(field): self._value(value) for field, value in described.items() if field != CLASS
        }  # fmt: skip
        scope, number = "", 1
        while any(self._bound.get(self._spelled(f"{scope}{name}.{f}"), value) != value for f, value in values.items()):
            number += 1
            scope = f"checkpoint_{number}/"
        for field, value in values.items():
            self._bound[self._spelled(f"{scope}{name}.{field}")] = value
        return f"@{self._spelled(f'{scope}{name}')}()"

    def _value(self, value: Any) -> str:
        if isinstance(value, Mapping) and CLASS in value:
            return self._made(value)
        if isinstance(value, Mapping) and "@" in value:
            return f"@{self._spelled(value['@'])}{'()' if value.get('call') else ''}"
        if isinstance(value, Mapping) and "%" in value:
            return f"%{self._checked(value['%'], _SCOPED_NAME)}"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{key!r}: {self._value(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list | tuple):
            return f"({''.join(f'{self._value(item)}, ' for item in value)})"
        if not isinstance(value, bool | int | float | str | None):
            raise UserError(f"The record of {self._where} holds {value!r}, which is not a setting.")
        return repr(value)

    def _spelled(self, name: str) -> str:
        """Returns a full name in terms of the name that its module is imported as."""
        scope, slash, selector = self._checked(name, _SCOPED_NAME).rpartition("/")
        if modules := [module for module in self._imports if selector.startswith(f"{module}.")]:
            module = max(modules, key=len)
            selector = self._imports[module] + selector.removeprefix(module)
        return f"{scope}{slash}{selector}"

    def _checked(self, name: Any, pattern: re.Pattern = _NAME) -> str:
        if not isinstance(name, str) or not pattern.fullmatch(name):
            raise UserError(f"The record of {self._where} holds {name!r} instead of a name.")
        return name
