"""`diffusion-t5x VERB ...` and `python -m diffusion_t5x VERB ...`: finds the verb and runs its module."""

import runpy
import sys
from collections.abc import Sequence

import diffusion_t5x
from diffusion_t5x import terminal
from diffusion_t5x.command_line import help_pages
from diffusion_t5x.command_line.verbs import VERBS
from diffusion_t5x.errors import did_you_mean


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a verb as `python -m diffusion_t5x.VERB` would; an unknown one ends with status 2 and a suggestion."""
    argv = list(sys.argv[1:] if argv is None else argv)
    modules = {name.partition(" ")[0]: verb.module for name, verb in VERBS.items()}
    with terminal.standard_streams():
        if not argv:
            print(help_pages.overview())
        elif argv[0] == "--version":
            print(diffusion_t5x.__version__)
        elif (page := help_pages.asked(argv)) is not None:
            print(page)
        elif argv[0] in modules:
            sys.argv[1:] = argv[1:]
            runpy.run_module(modules[argv[0]], run_name="__main__", alter_sys=True)
        else:
            verbs = f"The verbs are {', '.join(modules)}."
            print(
                f"error: There is no verb {argv[0]!r}.{did_you_mean(argv[0], modules) or f' {verbs}'}", file=sys.stderr
            )
            sys.exit(2)
