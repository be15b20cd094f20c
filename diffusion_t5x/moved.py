"""Old names of moved modules: code and gin files written for version 0.1 keep working, with a warning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

_ROOMS = {"conversion": "importing", "scale": "performance", "evaluation.sandbox": "evaluation.code.sandbox"}
_MODULES = {
    "command_line": ("config", "flags", "gin_guard", "processes"),
    "chat": ("data.prompts", "evaluation.answers", "evaluation.conversation", "evaluation.live_canvas"),
    "reporting": ("report", "runs", "charts", "decode_charts", "published", "trace_page"),
    "performance": ("stopwatch", "train_speed", "decode_times"),
    "checkpointing": ("checkpoints", "stored", "manifest", "assignment", "merging", "streaming", "start", "inspection"),
}
_UNDER = {"reporting": "evaluation.", "performance": "evaluation.", "checkpointing": "training."}
_MOVED = _ROOMS | {
    _UNDER.get(room, "") + name: f"{room}.{name.rpartition('.')[2]}"
    for room, names in _MODULES.items()
    for name in names
}
_MOVED |= {
    "evaluation.code_execution": "evaluation.code.execution",
    "evaluation.pass_at_k": "evaluation.code.pass_at_k",
    "models.flops": "performance.model_flops",
    "training.flops": "performance.step_flops",
    "training.progress": "progress",
}


def new_name(name: str) -> str | None:
    """Returns the new name of a moved module; None if the module has not moved."""
    package, _, old = name.partition(".")
    if old in _MOVED:
        return f"{package}.{_MOVED[old]}"
    room, _, module = old.rpartition(".")
    return f"{package}.{_ROOMS[room]}.{module}" if room in _ROOMS else None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that resolves old module names to the new modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.startswith(f"{__package__}.") and new_name(name):
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        new = new_name(module.__name__)
        assert new is not None
        warnings.warn(f"{module.__name__} is now {new}.", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


def install() -> None:
    """Makes the old names importable."""
    sys.meta_path.insert(0, _Finder())
