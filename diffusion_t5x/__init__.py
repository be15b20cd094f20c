"""diffusion_t5x: language models that write by diffusion, trained and run the T5X way."""

import sys

from diffusion_t5x import moved

__version__ = "0.1.0"

moved.install()


def _answer_help() -> None:
    """Prints the help that `python -m diffusion_t5x.VERB --help` asks for, before the verb imports what does the work.

    Python sets `sys.argv[0]` to "-m" while it looks for the module to run, which imports this package first.
    """
    from diffusion_t5x import terminal
    from diffusion_t5x.command_line import help_pages

    if (page := help_pages.answer(sys.orig_argv)) is not None:
        with terminal.standard_streams():
            print(page)
        sys.exit()


if sys.argv[:1] == ["-m"] and {"-h", "--help"} & set(sys.orig_argv):
    _answer_help()
