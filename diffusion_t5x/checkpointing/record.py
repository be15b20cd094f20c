"""Record of how a checkpoint was trained; part of the metadata, and every reader takes its settings from it."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from diffusion_t5x.checkpointing import legacy
from diffusion_t5x.data.vocabularies import SENTINELS
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.defaults import default_decoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.objective import Objective

PACKAGES = ("diffusion_t5x", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
_CHATS = "diffusion_t5x.tasks.chat"  # registers tasks of conversations
CLASS = "class"  # the key of an object's class among its fields


def describe(value: Any, name: Callable[[type], str] | None = None) -> Any:
    """Returns settings as JSON-serialisable values: a dataclass becomes its fields and, under "class", its name.

    Fields that its repr leaves out are left out here, too, where they have their default.

    Args:
      value: a dataclass, a container of them, or a plain value; anything else becomes its repr.
      name: returns a class's name; by default the one to import it by.
    """
    name = name or (lambda cls: f"{cls.__module__}.{cls.__qualname__}")
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: describe(getattr(value, field.name), name)
            for field in dataclasses.fields(value)
            if field.repr or getattr(value, field.name) != field.default
        }
        return {CLASS: name(type(value))} | fields
    if isinstance(value, Mapping):
        return {str(key): describe(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item, name) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def in_words(described: Any) -> str:
    """Returns the Python repr of an object that `describe` has described: "Masked(schedule='linear', ...)"."""
    if isinstance(described, Mapping):
        if CLASS not in described:
            return "{" + ", ".join(f"{key!r}: {in_words(value)}" for key, value in described.items()) + "}"
        fields = (f"{key}={in_words(value)}" for key, value in described.items() if key != CLASS)
        return f"{class_name(described)}({', '.join(fields)})"
    return f"[{', '.join(map(in_words, described))}]" if isinstance(described, list) else repr(described)


def is_plain(described: Any) -> bool:
    """True if `describe` could describe all of an object. What it cannot describe is a repr, "<function ...>"."""
    if isinstance(described, Mapping):
        return all(map(is_plain, described.values()))
    if isinstance(described, list | tuple):
        return all(map(is_plain, described))
    return not (isinstance(described, str) and described.startswith("<"))


def class_name(described: Mapping[str, Any]) -> str:
    """Returns the class of a described object, without its module."""
    return str(described[CLASS]).rpartition(".")[2]


def modes_of(user: object) -> tuple[Mode, ...]:
    """Returns the modes that an objective or decoder declares; () if it declares none."""
    return tuple(getattr(user, "modes", None) or ())


@dataclasses.dataclass(frozen=True)
class Record:
    """Record of how a model was trained. Objects are stored as `describe` returns them.

    Attributes:
      model: all fields of its `ModelConfig`.
      vocabulary: see `TokenIds.describe`.
      vocabulary_source: how the vocabulary is made, see `data.vocabularies.source_of`; None if unknown.
      objective: the training objective; None if unknown.
      modes: the modes that the model has learned; () if unknown.
      decoder: the default decoder of the model; None if there is none.
      dataset: the training data: task, lengths, layout of rows. None for an imported model.
      task: modules to import and bindings that register the task, see `config.registration`.
      inputs_end: True if the inputs end in EOS; None if unknown.
      lora: see `Lora.describe`.
      imported: True if the model comes from another framework.
      versions: versions of the libraries.
    """

    model: Mapping[str, Any]
    vocabulary: Mapping[str, Any]
    vocabulary_source: Mapping[str, Any] | None = None
    objective: Mapping[str, Any] | None = None
    modes: tuple[Mode, ...] = ()
    decoder: Mapping[str, Any] | None = None
    dataset: Mapping[str, Any] | None = None
    task: Mapping[str, Any] | None = None
    inputs_end: bool | None = None
    lora: Mapping[str, Any] | None = None
    imported: bool = False
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        vocabulary: Mapping[str, Any],
        objective: Objective,
        decoders: Sequence[Decoder] = (),
        **more: Any,
    ) -> Self:
        """Returns the record of a training with this objective.

        Args:
          model: its `vocab_size` is set.
          vocabulary: as in the record.
          objective: the training objective.
          decoders: the decoders of the evaluations; the first that suits the model becomes its default. If none does,
            the default decoder of the model's first mode is taken.
          **more: other fields of the record.
        """
        modes = modes_of(objective)
        suited = [decoder for decoder in decoders if not modes or set(modes_of(decoder)) <= set(modes)]
        decoder = suited[0] if suited else default_decoder(modes[0]) if modes else None
        return cls(
            model=dataclasses.asdict(model),
            vocabulary=vocabulary,
            objective=describe(objective),
            modes=modes,
            decoder=describe(decoder),
            versions=_versions(),
            **more,
        )

    @classmethod
    def of_import(
        cls,
        model: ModelConfig,
        vocabulary: Mapping[str, Any],
        vocabulary_source: Mapping[str, Any] | None,
        objective: Objective = Autoregressive(),  # noqa: B008  (frozen)
        decoder: Decoder | None = None,
    ) -> Self:
        """The record of a model that comes from another framework, where it was trained by `objective`."""
        inputs_end = model.architecture == "encoder_decoder"
        return cls.of(
            model,
            vocabulary,
            objective,
            [decoder] if decoder else (),
            vocabulary_source=vocabulary_source,
            inputs_end=inputs_end,
            imported=True,
        )

    @classmethod
    def read(cls, metadata: Mapping[str, Any], path: str) -> Self:
        """Returns the record in the metadata of the checkpoint at `path`; for older ones, made from their gin text.

        Raises:
          UserError: the record is damaged.
        """
        apart = {"vocabulary": metadata.get("vocabulary", {}), "lora": metadata.get("lora")}
        if (written := metadata.get("record")) is None:
            return cls._of_text(metadata.get("config", ""), **apart)
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            values = {name: value for name, value in written.items() if name in known}
            return cls(**values | apart | {"modes": tuple(Mode(**mode) for mode in written["modes"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the record of its training is damaged ({error!r}).") from error

    @classmethod
    def _of_text(cls, text: str, **apart: Any) -> Self:
        said = legacy.read(text)
        objective = Autoregressive() if said.imported else said.objective
        more = apart | {"dataset": said.dataset, "task": said.task, "imported": said.imported}
        if said.model is None or objective is None:
            model = dataclasses.asdict(said.model) if said.model else {}
            return cls(model=model, decoder=describe(said.decoder), **more)
        if said.imported:
            more["inputs_end"] = said.model.architecture == "encoder_decoder"
            more["vocabulary_source"] = {"file": said.vocabulary_file, "extra_ids": SENTINELS}
        decoders = [said.decoder] if said.decoder else []
        return dataclasses.replace(cls.of(said.model, objective=objective, decoders=decoders, **more), versions={})

    def metadata(self) -> dict[str, Any]:
        """Returns the record as metadata of a checkpoint: "record", "vocabulary" and, for a LoRA run, "lora"."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        vocabulary, lora = fields.pop("vocabulary"), fields.pop("lora")
        fields["modes"] = [dataclasses.asdict(mode) for mode in self.modes]
        return {"vocabulary": dict(vocabulary), **({"lora": dict(lora)} if lora else {}), "record": fields}

    def vocabulary_arguments(self, model_dir: str | os.PathLike) -> dict[str, Any] | None:
        """Returns the arguments of `data.vocabulary_files.vocabulary` that make the vocabulary; None if unknown.

        Args:
          model_dir: the model's folder. A vocabulary file that is missing at its recorded path is looked for here,
            because folders may be moved.
        """
        if not self.vocabulary_source:
            return None
        file = self.vocabulary_source.get("file")
        if file is not None and "://" not in file and not pathlib.Path(file).expanduser().exists():
            beside = pathlib.Path(model_dir) / pathlib.PurePath(file).name
            file = str(beside) if beside.exists() else file
        return {"file": file, "extra_ids": self.vocabulary_source["extra_ids"]}

    @property
    def shifted(self) -> bool | None:
        """`ModelConfig.shifted` of a diffusion model; None if unknown or irrelevant."""
        left_to_right = self.modes and not any(mode.noise for mode in self.modes)
        return None if left_to_right or self.objective is None else self.model.get("shifted")

    @property
    def may_chat(self) -> bool:
        """True if the model was trained on conversations here, or elsewhere on what is not known."""
        return self.imported or _CHATS in (self.task or {}).get("imports", ())

    @property
    def trained_by(self) -> str | None:
        """The objective's class without its module; None for an imported model or if unknown."""
        return class_name(self.objective) if self.objective and not self.imported else None


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
