"""List the shipped tasks and mixtures by family, with the gin file that registers each."""

import re
import sys
import textwrap
from collections.abc import Iterator

from diffusion_t5x.command_line import config, gin_macros, help_pages
from diffusion_t5x.command_line.gin_reading import shipped
from diffusion_t5x.data.libraries import libraries

_TASKS = "diffusion_t5x.tasks."


def families() -> dict[str, list[str]]:
    """Returns the shipped gin files that register tasks, by the module of `tasks/` that makes them."""
    found: dict[str, list[str]] = {}
    for file in shipped("tasks"):
        found.setdefault(_family(file), []).append(file)
    return dict(sorted(found.items()))


def describe(file: str) -> Iterator[str]:
    """Yields the tasks that a gin file registers and the macros it needs, as lines of text."""
    macros: dict[str, str] = {}
    for inner in gin_macros.with_includes(file):
        macros |= gin_macros.read(inner).values
    yield f"--gin_file={file}"
    first = re.split(r"[.:](?:\s|$)", gin_macros.read(file).comment)[0]
    yield f"    {textwrap.shorten(first, 110, placeholder='…')}"
    if "MIXTURE_OR_TASK_NAME" not in macros:
        yield f"    --gin.MIXTURE_OR_TASK_NAME={' | '.join(_registered(file))}"
    if required := [name for name, value in macros.items() if value == gin_macros.REQUIRED]:
        yield f"    set: {' '.join(f'--gin.{name}=...' for name in required)}"


def _family(file: str) -> str:
    """Returns the module of `tasks/` that makes a file's tasks."""
    imports: dict[str, str] = {}
    for inner in gin_macros.with_includes(file):
        imports |= gin_macros.read(inner).imports
    maker = gin_macros.read(file).values.get("MIXTURE_OR_TASK_NAME", "").removeprefix("@").partition(".")[0]
    modules = [imports.get(maker, ""), *imports.values()]
    return next(module.removeprefix(_TASKS) for module in modules if module.startswith(_TASKS))


def _registered(file: str) -> list[str]:
    """Returns the tasks and mixtures that SeqIO has after a file's imports."""
    with config.program():
        seqio, _ = libraries()

        config.load([file])
    names = [name for registry in (seqio.TaskRegistry, seqio.MixtureRegistry) for name in registry.names()]
    return sorted(name for name in names if name.startswith(_family(file)))


def main() -> None:
    """Prints the list, or the entries that contain a given word."""
    word = help_pages.arguments("tasks").word
    found = False
    for family, files in families().items():
        described = [list(describe(file)) for file in files]
        described = [lines for lines in described if word in " ".join([family, *lines])]
        if described:
            found = True
            print(f"{family.replace('_', ' ')}")
            print(*(f"  {line}" for lines in described for line in lines), sep="\n", end="\n\n")
    if not found:
        print(f"error: No task or gin file of tasks/ has {word!r} in its name.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
