"""Scores before and after training, on held-out text: likelihood, agreement with the start, tokens per pass."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping

from diffusion_t5x import eval as eval_verb
from diffusion_t5x import infer as infer_verb
from diffusion_t5x.ar2diff.recipe import on_cpu
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.defaults import default_decoder
from diffusion_t5x.evaluation.evaluator import DecodeEval, LikelihoodEval
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.performance.training_run import TrainingRun

logger = logging.getLogger(__name__)

SAMPLES = 3  # shown step by step


@dataclasses.dataclass(frozen=True)
class Budget:
    """The amount of scoring: held-out examples, noise draws for each, examples decoded, rows at a time."""

    scored: int
    draws: int
    decoded: int
    rows: int

    @classmethod
    def of_device(cls) -> "Budget":
        """Returns a budget of minutes on this machine for a model of a few hundred million parameters."""
        return cls(16, 4, 8, 8) if on_cpu() else cls(64, 32, 64, 16)


class Scores:
    """Scores of one model after another, each in its own folder for `report`.

    Args:
      folder: for these folders.
      run: the training, whose held-out data are read.
      start: path of the model that is converted; the judge of what is decoded.
    """

    def __init__(self, folder: pathlib.Path, run: TrainingRun, start: str):
        assert isinstance(run.dataset, SeqioDataset)
        self._folder, self._run, self._start = folder, run, start
        self._budget = Budget.of_device()
        self._held_out = dataclasses.replace(
            run.dataset, split="validation", batch_size=self._budget.rows, pack=False, shuffle=False
        )

    @property
    def diffuses(self) -> bool:
        """False for the baseline, which is trained as the autoregressive model that the start is."""
        return self._decoder != AutoregressiveDecoder()

    def of_start(self) -> dict[str, float]:
        """Scores the start as it is, an autoregressive model."""
        return self._evaluate("start", self._start, Autoregressive(), AutoregressiveDecoder())

    def of_untrained(self) -> dict[str, float]:
        """The start used as a diffusion model, without training."""
        logger.info("the start is read as a diffusion model, for which it isn't trained yet; the next lines say so")
        return self._evaluate("untrained", self._start, self._run.objective, self._decoder)

    def of_trained(self, checkpoint: str) -> dict[str, float]:
        """The result."""
        return self._evaluate("trained", checkpoint, self._run.objective, self._decoder)

    def samples(self, checkpoint: str) -> None:
        """Decodes the first held-out examples and keeps every step; also shows the canvases in the terminal."""
        infer_verb.infer(
            model=self._run.model,
            checkpoint_path=checkpoint,
            dataset=dataclasses.replace(self._held_out, canvas=True, batch_size=SAMPLES),
            infer_output_dir=str(self._folder / "samples"),
            decoder=self._decoder,
            num_examples=SAMPLES,
            trace=True,
            mesh=self._run.mesh,
        )

    @property
    def _decoder(self) -> Decoder:
        decoder = default_decoder(self._run.objective.modes[0])
        assert decoder is not None  # the shipped objectives all have one
        return decoder

    def _evaluate(self, name: str, checkpoint: str, objective: Objective, decoder: Decoder) -> dict[str, float]:
        folder, budget = self._folder / name, self._budget
        eval_verb.evaluate(
            model=self._run.model,
            checkpoint_path=checkpoint,
            eval_output_dir=str(folder),
            objective=objective,
            likelihood_evals=[LikelihoodEval(self._held_out, budget.scored, budget.draws)],
            decode_evals=[DecodeEval(dataclasses.replace(self._held_out, canvas=True), decoder, budget.decoded)],
            teacher_checkpoint_path=self._start,
            allow_mismatch=True,  # the start was not trained to write by diffusion: that is what is measured
            mesh=self._run.mesh,
        )
        results: Mapping[str, dict[str, float]] = json.loads((folder / "results.json").read_bytes())["results"]
        return results[self._held_out.name]
