"""The stages of a conversion, one after another; those that an earlier process has finished are left out."""

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
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.seqio_source import libraries
from diffusion_t5x.errors import UserError
from diffusion_t5x.reporting.report import write_report
from diffusion_t5x.training.lock import locked

logger = logging.getLogger(__name__)


def convert(command: Command, only_plan: bool) -> None:
    """Does what the command line asks for, or goes on where an earlier process was stopped.

    Args:
      command: what to do.
      only_plan: import the model, print the plan and stop.

    Raises:
      UserError: anything that does not fit, before training.
    """
    folder = command.output
    Journal(folder, command.describe())  # refuses a folder of something else before the lock makes one
    with locked(str(folder)):
        journal = Journal(folder, command.describe())
        begin = start.begin(command.model, command.tokenizer, folder / "start", journal)
        arguments = begin.record.vocabulary_arguments(begin.model_dir)
        if arguments is None:
            raise UserError(f"{begin} does not record its vocabulary, so your text cannot be tokenized.")
        libraries()
        data = look(command.kind, command.files, vocabulary_files.vocabulary(**arguments))
        recipe = Recipe(command, begin, data)
        found = journal.done("plan")
        plan = Plan(**found) if found else Plan.measure(command, recipe)
        journal.mark("plan", plan.describe())
        run = recipe.read()
        print(terminal.safe(f"The plan:\n{plan.lines(command, recipe, run, data, begin)}"), flush=True)
        if only_plan:
            print(f"Run the command without --plan to do it. The recipe: {recipe.path}")
            return
        print(terminal.safe(f"\n{recipe.path.read_text(encoding='utf-8')}"), flush=True)

        def stage(name: str, work: Callable[[], Any]) -> Any:
            """Returns the result of a stage, from this process or an earlier one."""
            if (known := journal.done(name)) is not None:
                return known
            logger.info("ar2diff: %s", name)
            result = work()
            journal.mark(name, True if result is None else result)
            jax.clear_caches()  # programs of this stage, which no other one runs
            return result

        scores = Scores(folder / "scores", run, begin.named)
        trained, checkpoint = str(folder / "train"), folder / "checkpoint"
        table = {
            "start": stage("score start", scores.of_start),
            "untrained": stage("score untrained", scores.of_untrained),
        }
        stage("train", recipe.run_train)
        stage("checkpoint", lambda: release.write_checkpoint(trained, checkpoint))
        table["trained"] = stage("score trained", lambda: scores.of_trained(str(checkpoint)))
        stage("samples", lambda: scores.samples(str(checkpoint)))
        exported = stage("export", lambda: release.export(checkpoint, begin, folder / "export"))
        release.write_card(folder, command.model, recipe, plan.tokens, table, exported)
        page = write_report([folder / "train", folder / "scores"], folder / "report.html")
        print(terminal.safe(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}\nAll in one page: {page}"))
