"""What gin files may import and name: one that came with somebody else's checkpoint must not run just anything."""

import types
from collections.abc import Sequence
from typing import Any

from gin import config as gin_config  # what reads imports is not part of gin's interface

PACKAGES = ("diffusion_t5x", "seqio", "t5", "optax")
_MACROS = "gin.config"  # where they are: what gin writes imports it


def allow(packages: Sequence[str]) -> None:
    """From now on gin files may use these packages or modules, and `PACKAGES`; else gin raises a PermissionError."""
    _GuardedContext.allowed = (*PACKAGES, _MACROS, *packages)
    gin_config.ParseContext = _GuardedContext


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
        if not any(f"{module}.".startswith(f"{name}.") for name in self.allowed):
            raise PermissionError(
                f"it {what}, but gin files may use {', '.join(PACKAGES)} only. If you trust it, add "
                f"--gin_allow={package}."
            )
