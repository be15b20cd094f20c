"""What gin files may import and name: one that came with somebody else's checkpoint must not run just anything."""

import types
from collections.abc import Sequence
from typing import Any

from gin import config as gin_config  # what reads imports is not part of gin's interface

PACKAGES = ("diffusion_t5x", "seqio", "t5", "optax")


def allow(packages: Sequence[str]) -> None:
    """From now on gin files may use these packages or modules, and `PACKAGES`; else gin raises a PermissionError."""
    _GuardedContext.allowed = (*PACKAGES, *packages)
    gin_config.ParseContext = _GuardedContext


class _GuardedContext(gin_config.ParseContext):
    """Reads a gin file's imports, and what it names in them."""

    allowed: tuple[str, ...] = ()

    def process_import(self, statement: Any) -> None:
        if not (statement.is_from and statement.module.startswith("__gin__.")):  # its own features
            self._check(statement.module, f"imports {statement.module}", statement.module)
        super().process_import(statement)

    def _resolve_selector(self, selector: str) -> tuple[list[str], list[Any]]:
        names, values = super()._resolve_selector(selector)
        if names[0] == "gin":  # macros and the like
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
