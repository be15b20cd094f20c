"""Limits what gin files may import, name and read: a file from a stranger's checkpoint must not run code."""

import dataclasses
import types
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from gin import config as gin_config  # what reads imports is not part of gin's interface

from diffusion_t5x.command_line import gin_reading
from diffusion_t5x.errors import UserError

PACKAGES = ("diffusion_t5x", "seqio", "t5", "optax")
# Of these a configuration may also refer to functions: they register tasks and make settings. Classes that stand for
# themselves, data classes and vocabularies, may be anywhere.
_SETTINGS = (
    "diffusion_t5x.data.vocabulary_files",
    "diffusion_t5x.evaluation.evaluator",
    "diffusion_t5x.evaluation.metrics",
    "diffusion_t5x.tasks",
    "diffusion_t5x.training.optimizers",
    "diffusion_t5x.training.schedules",
    "optax",
)
_VOCABULARIES = ("seqio.vocabularies.Vocabulary", "diffusion_t5x.data.vocabulary.Vocabulary")
# And of these, where a user wrote it.
_OF_OTHERS = (
    "seqio.metrics",
    "seqio.preprocessors",
    "t5.data.postprocessors",
    "t5.data.preprocessors",
    "t5.data.utils",
    "t5.evaluation.metrics",
)
# Parameters that name modules, which are then imported.
_IMPORTING = (("diffusion_t5x.cache_tasks.cache_tasks", "task_modules"),)
# Parameters that let something dangerous happen.
_DANGEROUS = ("allow_unsafe",)
_MACROS = "gin.config"  # where they are: what gin writes imports it


def allow(packages: Sequence[str]) -> None:
    """Lets gin files use these packages or modules, and `PACKAGES`; for others, gin raises a PermissionError."""
    _GuardedContext.allowed = (*PACKAGES, _MACROS, *packages)
    gin_config.ParseContext = _GuardedContext


def check_references(allowed: Sequence[str]) -> None:
    """Raises a PermissionError if gin files refer to anything but settings.

    Anything that files refer to may be called with their arguments, so it must not read, write, import or run what its
    arguments say. Gin from a checkpoint, which may be a stranger's, may refer to less than gin that the user wrote.

    Args:
      allowed: trusted packages or modules, besides `PACKAGES`.
    """
    trusted = [name for name in allowed if name not in PACKAGES]
    for (scope, selector), bound in gin_config._CONFIG.items():
        for name, value in bound.items():
            place = gin_reading.place((scope, selector, name))
            if place.kind == "flag":
                continue
            if name in _DANGEROUS and value is not False and not place.is_vouched:
                raise PermissionError(
                    f"{place}: it sets {name}, which only you may set. If you trust it, add --gin.{selector}.{name}=..."
                )
            functions = (*_SETTINGS, *trusted, *(_OF_OTHERS if place.is_vouched else ()))
            for reference in gin_config.iterate_references({name: value}):
                _check_target(reference.configurable.wrapped, functions, place)
    for selector, name in _IMPORTING:
        for module in _texts(gin_config._CONFIG.get(("", selector), {}).get(name)):
            if not _is_in(module, _GuardedContext.allowed):
                raise PermissionError(f"{selector}.{name} imports {module}. If you trust it, add --gin_allow={module}.")


def check_buckets(reached: Collection[tuple[str, str]]) -> None:
    """Raises a UserError if gin from a checkpoint names a bucket or another remote address that would be read.

    Args:
      reached: selectors and scopes that a verb evaluates.
    """
    for selector, scope in reached:
        parts = scope.split("/") if scope else []
        for outer in ["/".join(parts[:i]) for i in range(len(parts) + 1)]:
            for name, value in gin_config._CONFIG.get((outer, selector), {}).items():
                place = gin_reading.place((outer, selector, name))
                for text in _texts(value, through_macros=False):
                    if "://" in text and not place.is_vouched:
                        what = outer if selector == "gin.macro" else f"{selector}.{name}"
                        raise UserError(
                            f"{place}: {what} names {text!r}, but settings from a checkpoint must not name remote "
                            f"addresses. If you trust it, set it yourself: --gin.{what}=..."
                        )


def _check_target(target: Any, functions: Sequence[str], place: gin_reading.Place) -> None:
    if target in (gin_config.macro, gin_config._retrieve_constant, gin_config.singleton):
        return
    bases = {f"{base.__module__}.{base.__name__}" for base in getattr(target, "__mro__", ())}
    stands_for_itself = isinstance(target, type) and (dataclasses.is_dataclass(target) or bases & set(_VOCABULARIES))
    is_private = any(part.startswith("_") for part in target.__qualname__.split("."))
    if not stands_for_itself and (is_private or not _is_in(target.__module__, functions)):
        raise PermissionError(
            f"{place}: it refers to {target.__module__}.{target.__qualname__}, which does more than make settings. If "
            f"you trust it, add --gin_allow={target.__module__}."
        )


def _texts(value: Any, through_macros: bool = True) -> Iterator[str]:
    """Yields all text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for part in pair for text in _texts(part, through_macros))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _texts(part, through_macros))
    elif through_macros and isinstance(value, gin_config.ConfigurableReference):
        yield from _texts(gin_config._CONFIG.get((value.config_key), {}).get("value"))


def _is_in(module: str, packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


class _GuardedContext(gin_config.ParseContext):
    """Checks a gin file's imports, and the names that it uses from them."""

    allowed: tuple[str, ...] = ()

    def __init__(self, import_manager: Any = None):
        self._reads = import_manager is None  # else gin writes what has been read, with imports of its own
        super().__init__(import_manager)

    def process_import(self, statement: Any) -> None:
        is_gin = statement.is_from and (statement.module == _MACROS or statement.module.startswith("__gin__."))
        if self._reads and not is_gin:
            self._check(statement.module, f"imports {statement.module}", statement.module)
        super().process_import(statement)

    def _resolve_selector(self, selector: str) -> tuple[list[str], list[Any]]:
        names, values = super()._resolve_selector(selector)
        if not self._reads or names[0] == "gin":  # macros and the like
            return names, values
        for value in values:  # a module's attributes are also the modules that it imports: train.os.system
            module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            self._check(str(module), f"names {selector}, which is in {module}", str(module).partition(".")[0])
        return names, values

    def _check(self, module: str, what: str, package: str) -> None:
        if not _is_in(module, self.allowed):
            raise PermissionError(
                f"it {what}, but gin files may use {', '.join(PACKAGES)} only. If you trust it, add "
                f"--gin_allow={package}."
            )
