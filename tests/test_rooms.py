"""The rooms of the package stand on floors: a module imports from its own room and from floors below, never upwards."""

import ast
import os
import pathlib
import re
from collections.abc import Iterator

import pytest

import diffusion_t5x

PACKAGE = pathlib.Path(diffusion_t5x.__file__).parent
VERBS = (
    "train eval infer generate serve certify lm_eval cache_tasks inspect_data benchmark report checkpoints convert "
    "__main__"
)
# Lowest first. Rooms on one floor do not import each other, but for the single files of the lowest.
FLOORS = [
    (
        "errors",
        "records",
        "json_lines",
        "terminal",
        "console",
        "progress",
        "task_modules",
        "moved",
        "user_cache",
        "shapes",
    ),
    ("partitioning", "data"),
    ("models",),
    ("objectives", "decoding"),
    ("checkpointing",),
    ("training",),
    ("evaluation", "importing"),
    ("tasks",),
    ("performance", "chat"),
    ("reporting", "serving"),
    ("command_line",),
    tuple(VERBS.split()),
    ("api_values", "api_opening", "api_decoding"),
    ("api_chat",),
    ("api",),
    ("ar2diff",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> Iterator[tuple[str, pathlib.Path]]:
    """Room and path of each module, also of those behind the link `tasks`."""
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for name in sorted(names):
            path = pathlib.Path(folder, name)
            room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
            if path.suffix == ".py" and room != "__init__":
                yield room, path


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and room of each import from the package, also inside functions. Its own names, such as the version, have no
    room."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "diffusion_t5x" and rest and rest[0] in FLOOR:
                yield node.lineno, rest[0]


def misplaced(room: str, source: str) -> list[tuple[int, str]]:
    """Lines and rooms of the imports that go upwards or to a room beside this one."""
    lowest = FLOORS[0]
    return [
        (line, other)
        for line, other in imports(source)
        if other != room and FLOOR[other] >= FLOOR[room] and not {room, other} <= set(lowest)
    ]


def test_every_module_has_a_floor():
    assert {room for room, _ in modules()} == FLOOR.keys()


@pytest.mark.parametrize("room", FLOOR)
def test_no_import_goes_upwards_or_aside(room):
    found = {
        str(path.relative_to(PACKAGE)): misplaced(room, path.read_text(encoding="utf-8"))
        for its_room, path in modules()
        if its_room == room
    }
    assert found and {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("models", "def f():\n    from diffusion_t5x.training import step", [(2, "training")]),
        ("importing", "from diffusion_t5x.tasks import chat", [(1, "tasks")]),
        ("importing", "from diffusion_t5x import tasks, errors", [(1, "tasks")]),
        ("decoding", "import diffusion_t5x.objectives.block as block", [(1, "objectives")]),
        ("reporting", "from diffusion_t5x import __version__\nfrom diffusion_t5x.reporting import runs", []),
        ("progress", "from diffusion_t5x import terminal", []),
    ],
)
def test_imports_are_found_in_every_form(room, source, expected):
    assert misplaced(room, source) == expected


def test_the_readme_draws_the_same_floors():
    section = (PACKAGE.parent / "README.md").read_text(encoding="utf-8").partition("## Architecture")[2]
    drawn = [re.findall(r"\w+(?=/)", line.partition("  ")[0]) for line in section.split("```")[1].splitlines()]
    assert [tuple(rooms) for rooms in drawn if rooms] == [
        rooms for floor in FLOORS[::-1] if (rooms := tuple(room for room in floor if (PACKAGE / room).is_dir()))
    ]


def test_every_function_fits_a_screen():
    """80 lines, signature and docstring among them."""
    long = {}
    for _, path in modules():
        text = path.read_text(encoding="utf-8")
        sizes = {
            node.lineno: node.end_lineno - node.lineno + 1
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        name = path.relative_to(PACKAGE)
        long |= {f"{name}:{line}": size for line, size in sizes.items() if size > 80}
    assert long == {}


def test_every_file_can_be_read_in_one_go():
    """The tests, too."""
    paths = [*(path for _, path in modules()), *pathlib.Path(__file__).parent.rglob("*.py")]
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {name: number for name, number in lines.items() if number > 400} == {}


WORDS = "What|Of|Whose|Whether|How|For|Where|Which|Who"
ROOT = PACKAGE.parent


@pytest.mark.parametrize(
    ("paths", "clause"),
    [
        (
            [*(path for _, path in modules()), *(ROOT / "launch").glob("*.py")],
            f"{WORDS}|When|As|That|From|With|Without",
        ),
        ([*(ROOT / "tests").rglob("*.py")], WORDS),
    ],
    ids=["shipped", "tests"],
)
def test_docstrings_say_what_a_thing_is_or_does(paths, clause):
    """A noun or a verb comes first, never a clause such as "Whether it fits" or "Of all texts"."""
    clauses = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                if re.match(rf"({clause})\b", docstring):
                    clauses[f"{path.name}:{node.body[0].lineno}"] = docstring.splitlines()[0]
    assert paths and clauses == {}
