"""Writes docs/macros.md, the reference of all macros of the shipped gin files.

Run from a checkout: python -m diffusion_t5x.command_line.macro_reference
"""

import pathlib
import textwrap
from collections.abc import Iterator

from diffusion_t5x import records
from diffusion_t5x.command_line import gin_macros
from diffusion_t5x.command_line.gin_macros import REQUIRED, Macro

PAGE = pathlib.Path("docs/macros.md")
_INTRODUCTION = """\
# All macros

A macro is a setting with a name in capitals that gin files share. Set one on the command line:

```bash
diffusion-t5x train --gin_file=recipes/quickstart/pretrain_ar.gin --gin.MODEL_DIR=/tmp/model --gin.TRAIN_STEPS=100
```

`diffusion-t5x VERB --help` lists the macros of a verb. This page lists all of them. The page is
generated from the gin files and the docstrings of the parameters that macros are bound to. After changing one of these,
run `python -m diffusion_t5x.command_line.macro_reference`.
"""
_MOST_FILES = 4


def render() -> str:
    """Returns the page as Markdown."""
    macros = gin_macros.macros().values()
    rows = "\n".join(
        f"| [{macro.name}](#{macro.name.lower()}) | {_cell(_short(macro.meaning()))} |" for macro in macros
    )
    table = f"| macro | meaning |\n| --- | --- |\n{rows}\n"
    return "\n".join([_INTRODUCTION, table, *("\n".join(_section(macro)) for macro in macros)])


def _section(macro: Macro) -> Iterator[str]:
    yield f"## {macro.name}\n"
    if meaning := macro.meaning():
        yield f"{_escape(meaning[0].upper() + meaning[1:])}\n"
    values: dict[str, list[str]] = {}
    for file, value in macro.values.items():
        values.setdefault(value, []).append(file)
    yield "| value | set by |\n| --- | --- |"
    for value, files in values.items():
        shown = "*required*" if value == REQUIRED else f"`{textwrap.shorten(value, 80, placeholder=' …')}`"
        more = f" and {len(files) - _MOST_FILES} more" if len(files) > _MOST_FILES else ""
        yield f"| {_cell(shown)} | {', '.join(f'`{file}`' for file in files[:_MOST_FILES])}{more} |"
    parameters = list(dict.fromkeys(use.parameter for use in macro.uses))
    if parameters:
        yield f"\nBound to {', '.join(f'`{parameter}`' for parameter in parameters)}."
    yield ""


def _short(meaning: str) -> str:
    """Returns the first sentence, without its full stop."""
    return textwrap.shorten(meaning.split(". ")[0].rstrip("."), 110, placeholder=" …")


def _escape(text: str) -> str:
    """Escapes HTML for Markdown; code between backticks is unchanged."""
    pieces = text.split("`")
    return "`".join(piece if n % 2 else piece.replace("<", r"\<").replace("*", r"\*") for n, piece in enumerate(pieces))


def _cell(text: str) -> str:
    return _escape(text).replace("|", r"\|").replace(r"\*required\*", "*required*")


if __name__ == "__main__":
    records.write_text(gin_macros.PACKAGE.parent / PAGE, render())
    print(f"wrote {PAGE}")
