"""Tells the modules that register tasks from all others."""

_PACKAGES = ("diffusion_t5x", "__gin__", "gin", "optax", "seqio", "t5")


def registers_tasks(module: str) -> bool:
    """True if importing a module may register tasks: this project's task modules, and users' modules."""
    return module.startswith("diffusion_t5x.tasks.") or module.partition(".")[0] not in _PACKAGES
