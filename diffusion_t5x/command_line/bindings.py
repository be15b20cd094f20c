"""Settings of a command line as text for a gin file."""

import re
from collections.abc import Iterable

from gin import config as gin_config

from diffusion_t5x.command_line import config

_HEADER = "\n# From the command line:"


def as_text(bindings: Iterable[str]) -> str:
    """Gin text that sets what `--gin.NAME=VALUE` does, with full names and the imports they need.

    Args:
      bindings: "NAME=VALUE", valid where the configuration is loaded (see `config.load`).

    Returns:
      Lines that end in a newline; "" without bindings.
    """
    imports: dict[str, None] = {}
    lines = []
    for binding in bindings:
        name, _, value = (part.strip() for part in binding.partition("="))
        text = re.sub(r"(?<=@)[\w./]+", lambda match: _full(match[0], imports), config.gin_value(name, value))
        scoped, dot, parameter = name.rpartition(".")
        lines.append(f"{_full(scoped, imports) + dot if dot else ''}{parameter} = {text}")
    return "\n".join([_HEADER, *(f"import {module}" for module in imports), *lines, ""]) if lines else ""


def _full(name: str, imports: dict[str, None]) -> str:
    """A configurable's full name; its module is added to the imports."""
    scope, slash, selector = name.rpartition("/")
    match = gin_config._REGISTRY.get_match(selector)
    if match is None:  # an @ in a text
        return name
    found = match.wrapped
    imports[found.__module__] = None
    return f"{scope}{slash}{found.__module__}.{found.__qualname__}"
