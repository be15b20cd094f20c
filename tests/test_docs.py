"""Claims of the pages hold: their commands resolve, their example is the tested one, their links lead somewhere."""

import pathlib
import re
import shlex
import sys

import pytest

from diffusion_t5x import benchmark, checkpoints, infer, inspect_data, lm_eval, report, train
from diffusion_t5x import eval as evaluation
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.verbs import VERBS

pytest.importorskip("seqio")
from pages import by_module, write_gin_files
from untrained import give_record, untrained

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Modules that a reader is told to write, places that a reader's own text goes into, what knows no gin (and is run with
# its page's other commands in tests/importing), what reads a checkpoint first (see test_generate.py), and what another
# command writes (see test_walkthrough.py).
NOT_RUN_AS_IT_STANDS = re.compile(
    r"my_\w+|…|FILE|diffusion_t5x\.(convert|generate|serve|certify|ar2diff)|/tmp/walk/|/model\.gin"
)


def commands() -> list[str]:
    """Every command of the pages, of the run files' comments and of the verbs' help, as `python -m …` on one line."""
    found = set()
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found |= set(re.findall(r"python -m diffusion_t5x\.[^\n]+", by_module(block)))
    for file in sorted((ROOT / "gin").rglob("*.gin")):
        comment = "\n".join(
            line.removeprefix("#").strip() for line in file.read_text(encoding="utf-8").splitlines() if line[:1] == "#"
        )
        found |= set(re.findall(r"python -m diffusion_t5x\.[^\n]+", by_module(comment)))
    found |= {f"python -m diffusion_t5x.{verb.example}" for verb in VERBS.values() if verb.takes_gin}
    return sorted(command for command in found if not NOT_RUN_AS_IT_STANDS.search(command))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Stands for the checkpoints that the pages' commands name."""
    files = "objectives/block.gin", "decoding/block.gin"
    folder = untrained(tmp_path_factory.mktemp("docs") / "model", *files, form="new")
    give_record(folder, vocabulary_source={"file": None, "extra_ids": 100}, inputs_end=True)
    return folder


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_resolves(command, capsys, checkpoint, tmp_path, monkeypatch):
    for page in PAGES:
        write_gin_files(page.read_text(encoding="utf-8"), tmp_path)
    monkeypatch.chdir(tmp_path)
    _, _, module, *flags = shlex.split(command)
    if "--checkpoint" in flags:
        flags[flags.index("--checkpoint") + 1] = str(checkpoint)
    if module == report.__name__:  # verbs that have no gin
        assert report.parse(flags).runs
        return
    if module == checkpoints.__name__:
        assert checkpoints.parse(flags).command
        return
    if module in (
        evaluation.__name__,
        infer.__name__,
        inspect_data.__name__,
        benchmark.__name__,
        lm_eval.__name__,
        train.__name__,
    ):  # which have flags of their own
        sys.modules[module].main([*flags, "--print_config"])
        printed = capsys.readouterr()
        found = re.search(
            r"^# Parameters for \w+\.(evaluate|score|infer|inspect_data|decode|growth|train):$",
            printed.out,
            re.MULTILINE,
        )
        assert found and not printed.err
        return
    verb = module.rpartition(".")[2]
    main = getattr(__import__(module, fromlist=[verb]), verb)
    config.run(main, [*flags, "--print_config"])
    printed = capsys.readouterr()
    assert re.search(rf"^# Parameters for \w+\.{verb}:$", printed.out, re.MULTILINE) and not printed.err


def test_there_are_commands_to_resolve():
    assert len(commands()) >= 10


def test_the_readme_shows_the_task_example_that_is_tested():
    example = (ROOT / "tests" / "tasks" / "own_task_example.py").read_text(encoding="utf-8")
    for page in (ROOT / "README.md", ROOT / "docs" / "tasks.md"):
        assert example in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
