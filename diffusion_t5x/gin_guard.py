"""What gin files may import and name: one that came with somebody else's checkpoint must not run just anything."""

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

from gin import config as gin_config  # what reads imports is not part of gin's interface

PACKAGES = ("diffusion_t5x", "seqio", "t5", "optax")
# Of these a configuration may also refer to functions where nobody asked for it: they register tasks and make settings.
_SETTINGS = ("diffusion_t5x.tasks", "diffusion_t5x.training.optimizers", "diffusion_t5x.training.schedules")
_SETTINGS += ("diffusion_t5x.evaluation.metrics", "diffusion_t5x.evaluation.evaluator", "optax")
_MACROS = "gin.config"  # where they are: what gin writes imports it


def allow(packages: Sequence[str]) -> None:
    """From now on gin files may use these packages or modules, and `PACKAGES`; else gin raises a PermissionError."""
    _GuardedContext.allowed = (*PACKAGES, _MACROS, *packages)
    gin_config.ParseContext = _GuardedContext


def check_settings(allowed: Sequence[str]) -> None:
    """Raises a PermissionError where what gin has read so far refers to more than makes settings.

    For configurations that are read unasked, from a checkpoint: whatever they refer to may be called, with arguments of
    theirs. Data classes and vocabularies do nothing but stand for themselves.

    Args:
      allowed: packages or modules that are trusted, besides `PACKAGES`, which are not here.
    """
    trusted = [name for name in allowed if name not in PACKAGES]
    for reference in gin_config.iterate_references(gin_config._CONFIG):
        target = reference.configurable.wrapped
        if target in (gin_config.macro, gin_config._retrieve_constant, gin_config.singleton):
            continue
        bases = {f"{base.__module__}.{base.__name__}" for base in getattr(target, "__mro__", ())}
        stands_for_itself = isinstance(target, type) and (
            dataclasses.is_dataclass(target) or "seqio.vocabularies.Vocabulary" in bases
        )
        if not stands_for_itself and not _is_in(target.__module__, (*_SETTINGS, *trusted)):
            raise PermissionError(
                f"it refers to {target.__module__}.{target.__qualname__}, which does more than make settings. If you "
                f"trust it, add --gin_allow={target.__module__}."
            )


def _is_in(module: str, packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


class _GuardedContext(gin_config.ParseContext):
    """Reads a gin file's imports, and what it names in them."""

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
