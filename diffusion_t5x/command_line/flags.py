"""Parses the verbs' command lines: T5X's flags."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from diffusion_t5x.command_line import processes, profiling
from diffusion_t5x.errors import UserError, did_you_mean

ABOUT_OVERRIDES = """
--gin.NAME=VALUE sets a macro (--gin.TRAIN_STEPS=100) or a parameter (--gin.train.train.train_steps=100).
VALUE is gin syntax; names and paths may go without quotes (--gin.MODEL_DIR=/tmp/model).
"""


def parse_flags(
    module: str, argv: Sequence[str], takes_dry_run: bool, takes_mesh: bool, subcommand: str = ""
) -> argparse.Namespace:
    """Parses the flags `argv` of the verb in `module`.

    Args:
      module: name of the verb's module; its docstring heads the help.
      argv: the command line without the program's name.
      takes_dry_run: add a flag `--dry_run`.
      takes_mesh: add the flags for several processes, see `processes`.
      subcommand: the word before the flags, in a module with several verbs.

    Returns:
      gin_file, gin_bindings (including `--gin.NAME=VALUE`, as `NAME=VALUE`), gin_search_paths, gin_allow, print_config,
      dry_run (if the verb takes it), tfds_data_dir, profile, profile_seconds, and the flags of `processes.join` (if the
      verb takes a mesh).

    Raises:
      UserError: an unknown or malformed flag.
    """
    if {"-h", "--help"} & set(argv):
        from diffusion_t5x.command_line import help_pages  # it imports this module

        package, _, verb = module.partition(".")
        if package == "diffusion_t5x" and (page := help_pages.asked([*f"{verb} {subcommand}".split(), "--help"])):
            print(page)
            sys.exit()
    program = f"python -m {module}" if module != "__main__" else f"python {sys.argv[0]}"
    program = f"{program} {subcommand}".rstrip()
    parser = Parser(
        prog=program,
        usage="%(prog)s --gin_file=FILE [--gin.NAME=VALUE ...] [flags]",
        description=sys.modules[module].__doc__,
        epilog=ABOUT_OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_gin_flags(parser, takes_dry_run)
    if takes_mesh:
        processes.add_flags(parser)
    return parser.parse_args([_with_binding(argument) for argument in argv])


def add_gin_flags(parser: argparse._ActionsContainer, takes_dry_run: bool) -> None:
    """Adds the flags of a verb that reads gin files to its parser, or to a group of it."""
    add = parser.add_argument
    add("--gin_file", action="append", default=[], metavar="FILE", help="gin file; repeatable, later ones win")
    add("--gin_bindings", action="append", default=[], metavar="'NAME = VALUE'", help="the same as --gin.NAME=VALUE")
    add(
        "--gin_search_paths",
        default=[],
        type=lambda folders: folders.split(","),
        metavar="DIR,DIR",
        help="folders where gin files are looked up, before the shipped ones",
    )
    add(
        "--gin_allow",
        action="append",
        default=[],
        metavar="MODULE",
        help="module that gin files may import, too; repeatable. It is run: read it first",
    )
    add("--print_config", action="store_true", help="print the resolved configuration and stop")
    if takes_dry_run:
        add("--dry_run", action="store_true", help="build model, data and shapes, print them and stop")
    add("--tfds_data_dir", metavar="DIR", help="folder of the TensorFlow Datasets")
    profiling.add_flags(parser)


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UserError` for a wrong flag and suggests similar ones."""

    def error(self, message: str) -> NoReturn:
        suggestions = [
            did_you_mean(flag, self._option_string_actions)
            or (value and f" A setting is --gin.{flag[2:].upper()}{value}.")
            for flag, value in re.findall(r"(--\w+)(=\S+)?", message)
            if flag not in self._option_string_actions
        ]
        raise UserError(f"{message}.{''.join(suggestions)} --help lists the flags.")


def _with_binding(argument: str) -> str:
    """Returns `--gin.NAME=VALUE` as `--gin_bindings=NAME=VALUE`; other arguments unchanged."""
    if not argument.startswith("--gin."):
        return argument
    if "=" not in argument:
        raise UserError(f"{argument}: write --gin.NAME=VALUE, with an equals sign and no space around it.")
    return "--gin_bindings=" + argument.removeprefix("--gin.")
