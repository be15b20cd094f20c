"""Commands and gin files of the pages, as the tests run them."""

import pathlib
import re


def by_module(text: str) -> str:
    """The text with each `diffusion-t5x VERB` written as `python -m diffusion_t5x.VERB`, and continued lines joined."""
    return re.sub(r"(?<![\w/-])diffusion-t5x (?=[a-z])", "python -m diffusion_t5x.", text.replace("\\\n", " "))


def write_gin_files(text: str, folder: pathlib.Path) -> None:
    """Writes the gin files that a page shows, each of which begins with its name, as "# questions.gin"."""
    for block in re.findall(r"```gin\n(.*?)```", text, re.DOTALL):
        (folder / re.match(r"# (\w+\.gin)\n", block)[1]).write_text(block, encoding="utf-8")
