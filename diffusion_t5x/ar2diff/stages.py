"""The stages of a conversion, one after another; those that an earlier process has finished are left out."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax

from diffusion_t5x import terminal
from diffusion_t5x.ar2diff import release, start
from diffusion_t5x.ar2diff.command import Command
from diffusion_t5x.ar2diff.data import look
from diffusion_t5x.ar2diff.journal import Journal
from diffusion_t5x.ar2diff.plan import Plan
from diffusion_t5x.ar2diff.recipe import Recipe
from diffusion_t5x.ar2diff.scores import Scores
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.errors import UserError
from diffusion_t5x.performance.training_run import TrainingRun
from diffusion_t5x.reporting.report import write_report
from diffusion_t5x.training.lock import locked

logger = logging.getLogger(__name__)


def convert(command: Command, only_plan: bool) -> None:
    """Runs the conversion, or resumes where an earlier process stopped.

    Args:
      command: what to do.
      only_plan: import the model, print the plan and stop.

    Raises:
      UserError: anything that does not fit, before training.
    """
    folder = command.output
    Journal(folder, command.describe())  # refuses a folder of something else, in which the lock would leave a file
    with locked(str(folder)):
        journal = Journal(folder, command.describe())
        found = start.begin(command.model, command.tokenizer, folder / "start", journal)
        conversion, plan = _planned(command, journal, found)
        recipe = conversion.recipe.path
        if only_plan:
            print(terminal.safe(f"The same command without --plan does it. The recipe: {recipe}"))
            return
        print(terminal.safe(f"\n{recipe.read_text(encoding='utf-8')}"), flush=True)
        conversion.run(plan.tokens)


def _planned(command: Command, journal: Journal, begin: OpenCheckpoint) -> tuple["_Conversion", Plan]:
    """Measures the plan, if no earlier process has, and prints it."""
    arguments = begin.record.vocabulary_arguments(begin.model_dir)
    if arguments is None:
        raise UserError(f"{begin} does not record its vocabulary, so your text cannot be tokenized.")
    data = look(command.kind, command.files, vocabulary_files.vocabulary(**arguments))
    recipe = Recipe(command, begin, arguments["file"], data)
    known = journal.done("plan")
    plan = Plan(**known) if known else Plan.measure(command, recipe)
    journal.mark("plan", plan.describe())
    run = recipe.read()
    print(terminal.safe(f"The plan:\n{plan.lines(command, recipe, run, data, begin)}"), flush=True)
    return _Conversion(command, journal, begin, recipe, run), plan


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """A conversion after its plan: training, scores, export."""

    command: Command
    journal: Journal
    start: OpenCheckpoint
    recipe: Recipe
    training: TrainingRun

    def run(self, tokens: int) -> None:
        """Does what is left of it, and writes page and model card. `tokens` are those trained on."""
        folder = self.command.output
        scores = Scores(folder / "scores", self.training, self.start.named)
        trained, checkpoint = str(folder / "train"), folder / "checkpoint"
        table = {"start": self._stage("score start", scores.of_start)}
        if scores.diffuses:
            table["untrained"] = self._stage("score untrained", scores.of_untrained)
        self._stage("train", self.recipe.run_train)
        self._stage("checkpoint", lambda: release.write_checkpoint(trained, checkpoint))
        table["trained"] = self._stage("score trained", lambda: scores.of_trained(str(checkpoint)))
        self._stage("samples", lambda: scores.samples(str(checkpoint)))
        exported = self._stage("export", lambda: release.export(checkpoint, self.start, folder / "export"))
        drafts = self.training.objective.trains_drafts
        release.write_card(folder, self.command.model, self.recipe, tokens, table, exported, drafts)
        page = write_report([folder / "train", folder / "scores"], folder / "report.html")
        card = (folder / "README.md").read_text(encoding="utf-8")
        print(terminal.safe(f"\n{card}\nAll on one page: {page}"))

    def _stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Returns the result of a stage, from this process or an earlier one; True if it has none."""
        if (known := self.journal.done(name)) is not None:
            return known
        logger.info("ar2diff: %s", name)
        found = work()
        self.journal.mark(name, True if found is None else found)
        jax.clear_caches()  # the programs of this stage, which no other one runs
        return self.journal.done(name)
