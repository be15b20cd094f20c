"""Makes objects from their descriptions in a checkpoint's record: the inverse of `record.describe`."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x.checkpointing.record import CLASS, Record
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig

# A checkpoint may be a stranger's: it may name settings of these packages, and nothing else unasked.
_TRUSTED = ("diffusion_t5x.models", "diffusion_t5x.objectives", "diffusion_t5x.decoding")


def rebuild(described: Any, where: str, allow: Sequence[str] = ()) -> Any:
    """Returns the object that `record.describe` described. Lists become tuples.

    Only dataclasses of trusted modules are made; no other module is imported.

    Args:
      described: see `record.describe`.
      where: the checkpoint's name in messages.
      allow: more trusted packages or modules.

    Raises:
      UserError: a class that is not trusted or does not exist, or fields that it does not have.
    """
    if isinstance(described, list | tuple):
        return tuple(rebuild(item, where, allow) for item in described)
    if not isinstance(described, Mapping):
        return described
    fields = {name: rebuild(value, where, allow) for name, value in described.items() if name != CLASS}
    if CLASS not in described:
        return fields
    cls = _class(described[CLASS], where, (*_TRUSTED, *allow))
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(
            f"{where} was written with different settings of {cls.__name__} than this version has: {error}."
        ) from error


def model_config(record: Record, where: str) -> ModelConfig:
    """Returns the dimensions of a record's model, with the default attention kernel of this machine.

    Raises:
      UserError: the record does not have them.
    """
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"attention_backend"}
    if not record.model:
        raise UserError(f"{where} does not say what model it is: it was written without its settings.")
    return ModelConfig(**{key: rebuild(value, where) for key, value in record.model.items() if key in known})


def _class(name: Any, where: str, trusted: Sequence[str]) -> type:
    module, _, attribute = str(name).rpartition(".")
    if not any(f"{module}.".startswith(f"{package}.") for package in trusted):
        raise UserError(
            f"{where} names {name}, which is not a part of diffusion_t5x. If you trust it, give allow=[{module!r}]."
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where} names {name}, which does not exist: {error}.") from error
    if not dataclasses.is_dataclass(cls) or not isinstance(cls, type) or cls.__module__ != module:
        raise UserError(f"{where} names {name}, which is no dataclass of {module}.")
    return cls
