"""The user's cache folder, for what can be made again."""

import os
import pathlib


def user_cache() -> pathlib.Path:
    """`$XDG_CACHE_HOME/diffusion_t5x`, by default `~/.cache/diffusion_t5x`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "diffusion_t5x")
