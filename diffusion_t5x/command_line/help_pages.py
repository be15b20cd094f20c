"""The pages of `--help`: the list of verbs, and flags, an example and macros of each verb."""

import argparse
import importlib.util
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence

import diffusion_t5x
from diffusion_t5x.command_line import gin_macros, processes
from diffusion_t5x.command_line.flags import ABOUT_OVERRIDES, Parser, add_gin_flags
from diffusion_t5x.command_line.verbs import VERBS, Verb, with_flags
from diffusion_t5x.errors import UserError

COMMAND = "diffusion-t5x"
_WIDTH = 110
_HELP = {"-h", "--help"}


def asked(argv: Sequence[str]) -> str | None:
    """Returns the page that a command line such as `train --help` asks for; None if it asks for none."""
    if not _HELP & set(argv):
        return None
    words = [word for word in argv[:2] if not word.startswith("-")]
    if not words:
        return overview()
    name = next((name for name in (" ".join(words), words[0]) if name in VERBS), None)
    if name:
        inner = len(words) > 1 and not VERBS[name].takes_gin  # such as `convert from_hf --help`, which argparse answers
        return None if inner else parser(name).format_help()
    subcommands = [name for name in VERBS if name.startswith(f"{words[0]} ")]
    return f"{_description(VERBS[subcommands[0]].module)}\n\n{_list(subcommands)}" if subcommands else None


def overview() -> str:
    """Returns the list of all verbs, one line each."""
    return (
        f"usage: {COMMAND} VERB [flags]\n\n"
        f"Diffusion language models in JAX: train, convert, evaluate, generate. Version {diffusion_t5x.__version__}\n\n"
        f"{_list(VERBS)}\n\n"
        f"{COMMAND} VERB --help shows its flags, an example and its macros. "
        f"python -m diffusion_t5x.VERB does the same as {COMMAND} VERB."
    )


def parser(name: str) -> argparse.ArgumentParser:
    """Returns the parser of a verb with all that its help shows; verbs without gin also read their flags with it."""
    return _gin_parser(name) if VERBS[name].takes_gin else _plain_parser(name)


def arguments(name: str) -> argparse.Namespace:
    """Reads the flags of a small verb; a wrong one ends the process with a line on stderr and status 2."""
    try:
        return parser(name).parse_args()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _gin_parser(name: str) -> argparse.ArgumentParser:
    verb = VERBS[name]
    command = argparse.ArgumentParser(
        prog=f"{COMMAND} {name}",
        usage="%(prog)s --gin_file=FILE [--gin.NAME=VALUE ...] [flags]",
        description=_description(verb.module),
        epilog=f"{ABOUT_OVERRIDES}\nexample:\n{_example(verb)}{_macros(verb)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if verb.flags:
        with_flags(command.add_argument_group(f"flags of {name}"), verb.flags)
    group = command.add_argument_group("configuration")
    add_gin_flags(group, takes_dry_run=verb.takes_dry_run)
    if verb.takes_mesh:
        processes.add_flags(command.add_argument_group("several processes"))
    return command


def _plain_parser(name: str) -> Parser:
    verb = VERBS[name]
    made = Parser(
        prog=f"{COMMAND} {name}",
        description=_description(verb.module),
        epilog=f"example:\n{_example(verb)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    assert verb.add_arguments is not None, "a verb without gin has arguments of its own"
    verb.add_arguments(made)
    return made


def _list(names: Iterable[str]) -> str:
    width = max(map(len, names))
    return "\n".join(f"  {name:<{width}}  {VERBS[name].summary}" for name in names)


def _example(verb: Verb) -> str:
    """Returns the example, broken at flags into lines that can be pasted."""
    pieces = re.split(r" (?=--)", f"{COMMAND} {verb.example}")
    lines, current = [], pieces[0]
    for piece in pieces[1:]:
        if len(current) + len(piece) + 5 > _WIDTH:
            lines.append(current)
            current = piece
        else:
            current += f" {piece}"
    return "  " + " \\\n    ".join([*lines, current])


def _macros(verb: Verb) -> str:
    """Returns the macros of the verb's run files, one line each, under the file that sets them."""
    sections, seen = [], set()
    for run in verb.runs:
        files = gin_macros.with_includes(run)
        own = [macro for macro in gin_macros.of_runs([run]) if macro.name not in seen]
        seen |= {macro.name for macro in own}
        lines = [_macro_line(macro.name, macro.default(files), macro.meaning(files)) for macro in own]
        if lines:
            sections.append(f"\nmacros of {run}, as --gin.NAME=VALUE:\n" + "\n".join(lines))
    more = "\nAll macros: docs/macros.md" if sections else ""
    return "\n" + "\n".join(sections) + more


def _macro_line(name: str, default: str, meaning: str) -> str:
    value = "(required)" if default == gin_macros.REQUIRED else f"= {textwrap.shorten(default, 24, placeholder='…')}"
    return f"  {name} {value}".ljust(46) + "  " + textwrap.shorten(meaning, _WIDTH - 48, placeholder="…")


def _description(module: str) -> str:
    """Returns a module's docstring without importing the module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    docstring = re.match(r'r?"""(.*?)"""', pathlib.Path(spec.origin).read_text(encoding="utf-8"), re.DOTALL)
    assert docstring is not None
    return docstring[1].strip()


def answer(program: Sequence[str]) -> str | None:
    """Returns the help for a process started as `python -m diffusion_t5x.VERB ... --help`, or None.

    Args:
      program: the command line of Python, `sys.orig_argv`.
    """
    if "-m" not in program or not _HELP & set(program):
        return None
    module, *flags = program[program.index("-m") + 1 :]
    package, _, verb = module.partition(".")
    is_verb = package == diffusion_t5x.__name__ and verb in {known.partition(" ")[0] for known in VERBS}
    return asked([verb, *flags]) if is_verb else None
