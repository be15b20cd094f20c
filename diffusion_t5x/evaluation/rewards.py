"""Rewards for reinforcement learning: a task's metrics, the share of a program's tests that pass, formats, sums.

Any function `f(text, example) -> float` is a reward, too (see `training.rewards.Reward`).
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion_t5x.data import scoring
from diffusion_t5x.data.examples import Example
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.code import execution
from diffusion_t5x.evaluation.code.execution import Limits, Tests
from diffusion_t5x.training.rewards import Reward, attempts, of_each


@dataclasses.dataclass(frozen=True)
class Metric:
    """A SeqIO metric function of one example, such as `evaluation.metrics.exact_match`, over `scale`.

    Attributes:
      dataset: the task, whose postprocessor turns texts into what the metric compares.
      metric: `f(targets, predictions) -> {name: value}`.
      name: the value that counts.
      scale: what is worth a reward of 1; 100 for metrics in percent.
    """

    dataset: SeqioDataset
    metric: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]
    name: str
    scale: float = 100.0

    def check_here(self) -> None:
        wanted = [name for name in ("scores", "aux_values") if name in inspect.signature(self.metric).parameters]
        if wanted:  # by these names SeqIO knows them, too
            raise UserError(
                f"A reward judges texts, but the metric {scoring.name_of(self.metric)} takes {wanted[0]!r}: choose one "
                "of targets and predictions."
            )
        scoring.check_metrics([self.metric])

    def __call__(self, text: str, example: Example) -> float:
        target, prediction = self.dataset.postprocessed(text, example)
        found = scoring.values(self.metric, [target], [[prediction]])
        if self.name not in found:
            raise UserError(f"The metric of the reward has no value {self.name!r}, only {', '.join(found)}.")
        return found[self.name] / self.scale


@dataclasses.dataclass(frozen=True)
class PassedTests:
    """The share of a program's tests that pass, each run by itself in the sandbox (`evaluation.code.execution`).

    A program that breaks a limit with one test may still pass others.

    Attributes:
      dataset: the task, such as `mbpp`: its postprocessor returns an example's `Tests`, and the program in a text.
      limits: of each run.
      allow_unsafe: run programs even if the machine allows no isolation: they can then read and write whatever you can.
    """

    dataset: SeqioDataset
    limits: Limits = Limits()
    allow_unsafe: bool = False

    def check_here(self) -> None:
        execution.check_isolation(self.allow_unsafe)

    def __call__(self, text: str, example: Example) -> float:
        return float(self.of_all([text], [example], self.limits.wall_seconds)[0])

    def of_all(self, texts: Sequence[str], examples: Sequence[Example], seconds: float) -> Float[np.ndarray, " texts"]:
        """Returns the share of each text's tests that pass; programs run side by side, one per processor.

        `seconds` are for reading a text; `limits` hold for the programs.
        """
        programs, single, of_text = [], [], []
        read = attempts(self.dataset.postprocessed, texts, examples, seconds)
        for number, (tests, program) in ((number, each) for number, each in enumerate(read) if each is not None):
            if not isinstance(tests, Tests):
                raise UserError(f"PassedTests needs a task whose targets are tests, unlike {self.dataset.name!r}.")
            programs += [program] * len(tests.asserts)
            single += [dataclasses.replace(tests, asserts=(each,)) for each in tests.asserts]
            of_text += [number] * len(tests.asserts)
        verdicts = execution.check(programs, single, limits=self.limits, allow_unsafe=self.allow_unsafe, quiet=True)
        passed: dict[int, list[bool]] = {}
        for number, verdict in zip(of_text, verdicts, strict=True):
            passed.setdefault(number, []).append(verdict.passed)
        return np.array([np.mean(passed[number]) if number in passed else np.nan for number in range(len(texts))])


@dataclasses.dataclass(frozen=True)
class Format:
    """1 for a text that matches a regular expression as a whole, else 0.

    Attributes:
      pattern: in Python's syntax; "." matches line ends, too.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"Format.pattern {self.pattern!r} is no regular expression: {error}.") from error

    def __call__(self, text: str, example: Example) -> float:
        return float(re.fullmatch(self.pattern, text, re.DOTALL) is not None)


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Partial credit for a start that hardly ever meets the target: `difflib`'s ratio of characters, 1 for the target.

    Twice the number of characters in matching blocks, over the length of both texts.
    """

    def __call__(self, text: str, example: Example) -> float:
        return difflib.SequenceMatcher(None, example["targets_pretokenized"], text, autojunk=False).ratio()


@dataclasses.dataclass(frozen=True)
class Sum:
    """The weighted sum of rewards.

    Attributes:
      rewards: the rewards.
      weights: a weight for each.
    """

    rewards: Sequence[Reward]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.rewards or len(self.rewards) != len(self.weights):
            raise UserError(f"Sum has {len(self.rewards)} rewards and {len(self.weights)} weights: give one to each.")

    def check_here(self) -> None:
        scoring.check_metrics(self.rewards)

    def __call__(self, text: str, example: Example) -> float:
        return sum(weight * reward(text, example) for reward, weight in zip(self.rewards, self.weights, strict=True))

    def of_all(self, texts: Sequence[str], examples: Sequence[Example], seconds: float) -> Float[np.ndarray, " texts"]:
        """Returns the sum of each text's rewards; a text has failed if one of them did."""
        found = np.stack([of_each(reward, texts, examples, seconds) for reward in self.rewards])
        return np.asarray(self.weights) @ found
