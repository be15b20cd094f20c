"""Commands of the pages, as the tests run them."""

import re


def by_module(text: str) -> str:
    """The text with each `diffusion-t5x VERB` written as `python -m diffusion_t5x.VERB`, and continued lines joined."""
    return re.sub(r"(?<![\w/-])diffusion-t5x (?=[a-z])", "python -m diffusion_t5x.", text.replace("\\\n", " "))
