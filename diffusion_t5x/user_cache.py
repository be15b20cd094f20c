"""The user's cache folder, for what can be made again."""

import os
import pathlib
import platform
import sys

_MOST_BYTES = 4 << 30  # of compiled programs


def user_cache() -> pathlib.Path:
    """`$XDG_CACHE_HOME/diffusion_t5x`, by default `~/.cache/diffusion_t5x`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "diffusion_t5x")


def keep_compiled() -> None:
    """Lets JAX keep compiled programs in the user's cache, where JAX_COMPILATION_CACHE_DIR names no other folder.

    Each machine has its own folder: a CPU's programs may not run on another. The least recently used programs go.
    JAX_ENABLE_COMPILATION_CACHE=false keeps none. With several CPU devices none are kept either: once loaded, programs
    of jaxlib 0.10.2 may run independent collectives in different orders on different devices, and wait forever.
    """
    several_cpus = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or several_cpus or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    folder = str(user_cache() / "compiled" / platform.node())
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_COMPILATION_CACHE_MAX_SIZE": str(_MOST_BYTES)}
    if jax := sys.modules.get("jax"):  # which has read its settings already
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
