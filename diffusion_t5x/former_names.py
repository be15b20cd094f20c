"""Former names of modules, which import as the modules that they are now.

Gin files and modules of users import them, and so do the configurations of older checkpoints.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = __name__.rpartition(".")[0]
_FOLDERS = {"conversion": "importing", "scale": "performance", "evaluation.sandbox": "evaluation.code.sandbox"}
_MODULES = {
    "": {"command_line": "config flags gin_checks gin_guard gin_macros gin_messages gin_reading processes recorded"},
    "data": {"chat": "prompts"},
    "evaluation": {
        "chat": "answers conversation live_canvas",
        "evaluation.code": "pass_at_k",
        "performance": "decode_times stopwatch train_speed",
        "reporting": "animation charts decode_charts published report runs shown trace_page",
    },
    "training": {
        "": "progress",
        "checkpointing": "assignment checkpoints inspection legacy manifest merging record start stored streaming",
    },
}
_OTHERS = {
    "evaluation.code_execution": "evaluation.code.execution",
    "models.flops": "performance.model_flops",
    "training.flops": "performance.step_flops",
}


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


_MOVED = _OTHERS | {
    _joined(before, name): _joined(now, name)
    for before, folders in _MODULES.items()
    for now, names in folders.items()
    for name in names.split()
}


def present_name(name: str) -> str | None:
    """The full name of the module that `name` was once the full name of; None where it was none."""
    package, _, rest = name.partition(".")
    if package != _PACKAGE:
        return None
    for before, now in _FOLDERS.items():
        if f"{rest}.".startswith(f"{before}."):
            return _joined(package, now, rest[len(before) + 1 :])
    return _joined(package, _MOVED[rest]) if rest in _MOVED else None


class _Finder:
    """Finds modules by their former names, and loads them by their present ones."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Finder) if present_name(name) else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(present_name(module.__name__))


def install() -> None:
    """From now on imports find former names."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
