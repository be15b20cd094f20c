"""Rewards of texts that the model wrote, and advantages within groups of texts for the same prompt."""

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.examples import Example, Examples
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Reward(Protocol):
    """A function of a text and its example, on the host: a plain function, or a frozen dataclass with settings.

    A reward that cannot run everywhere has a method `check_here`, which raises a UserError before training begins. One
    that judges many texts faster together has a method `of_all`, see `OfAll`.
    """

    def __call__(self, text: str, example: Example) -> float:
        """Returns the reward of a text: finite, and higher is better.

        Any exception but a UserError, which ends the run, counts as a failure.

        Args:
          text: what the model wrote, up to its end.
          example: the example's fields, with "inputs_pretokenized" and "targets_pretokenized".
        """


@runtime_checkable
class OfAll(Protocol):
    """A reward that judges many texts together, such as in several processes."""

    def of_all(self, texts: Sequence[str], examples: Sequence[Example], seconds: float) -> Float[np.ndarray, " texts"]:
        """Returns the reward of each text, NaN where it failed; it holds the time limit of each itself."""


@dataclasses.dataclass(frozen=True)
class LengthPenalty:
    """Subtracts from a reward what grows with a text's length (DAPO's soft overlong punishment, arXiv 2503.14476).

    An empty text pays all of it: if writing nothing were free, it would beat an honest attempt.

    Attributes:
      start: tokens, the end included, up to which a text pays nothing.
      end: tokens from which it pays all; in between the penalty grows linearly.
      weight: the whole penalty.
    """

    start: int
    end: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end or not self.weight > 0:
            raise UserError(f"LengthPenalty needs 0 <= start < end and a weight above 0; got {self}.")

    def of(self, lengths: Int[np.ndarray, " texts"], empty: Bool[np.ndarray, " texts"]) -> Float[np.ndarray, " texts"]:
        """Returns each text's penalty, at least 0.

        Args:
          lengths: tokens of each text.
          empty: which texts are empty or white space.
        """
        share = np.clip((lengths - self.start) / (self.end - self.start), 0, 1)
        return (self.weight * np.where(empty, 1, share)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Settings for judging the texts of a rollout.

    Attributes:
      reward: judges a text.
      group_size: number of texts for each prompt, which are compared with each other.
      divide_by_std: an advantage is the reward minus the group's mean, over the group's standard deviation (GRPO, arXiv
        2402.03300). False does not divide, which weighs prompts by how much their texts differ (Dr. GRPO, arXiv
        2503.20783).
      length_penalty: subtracted from the reward of each text; None: nothing.
      seconds: time limit of a reward. It interrupts Python code in the main thread, unless the reward sets an alarm of
        its own.
    """

    reward: Reward
    group_size: int = 8
    divide_by_std: bool = True
    length_penalty: LengthPenalty | None = None
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise UserError(f"Rewards.group_size must be at least 2: texts are compared; got {self.group_size}.")
        if not self.seconds > 0:
            raise UserError(f"Rewards.seconds must be above 0; got {self.seconds}.")


def judged(
    reward: Reward, texts: Sequence[str], examples: Sequence[Example], seconds: float
) -> tuple[Float[np.ndarray, " texts"], Bool[np.ndarray, " texts"]]:
    """Returns the reward of each text, and which rewards failed: these are 0. An empty text earns at most 0.

    A reward fails if it raises an exception, takes too long or is not finite.

    Args:
      reward: judges a text.
      texts: what the model wrote.
      examples: the example of each text.
      seconds: time limit of each reward.

    Raises:
      UserError: the reward raised it.
    """
    found = of_each(reward, texts, examples, seconds)
    failed = ~np.isfinite(found)
    empty = np.array([not text.strip() for text in texts], bool)
    return np.where(failed, 0, np.where(empty, np.minimum(found, 0), found)).astype(np.float32), failed


def of_each(
    reward: Reward, texts: Sequence[str], examples: Sequence[Example], seconds: float
) -> Float[np.ndarray, " texts"]:
    """Returns the reward of each text, and NaN where it failed; arguments as in `judged`."""
    if isinstance(reward, OfAll):
        return np.asarray(reward.of_all(texts, examples, seconds), np.float64)

    def finite(text: str, example: Example) -> float:
        found = float(reward(text, example))
        if not math.isfinite(found):
            raise ValueError(f"the reward is {found}")
        return found

    return np.array(attempts(finite, texts, examples, seconds), np.float64)  # None is NaN


def attempts(
    function: Callable[[str, Example], Result], texts: Sequence[str], examples: Sequence[Example], seconds: float
) -> list[Result | None]:
    """Returns the results of a function of each text, None where it raised an exception or took too long.

    Raises:
      UserError: the function raised it.
    """
    found: list[Result | None] = []
    for text, example in zip(texts, examples, strict=True):
        try:
            with _at_most(seconds):
                found.append(function(text, example))
        except UserError:
            raise
        except (Exception, _OutOfTime) as error:
            if None not in found:
                what = str(error) if isinstance(error, _OutOfTime) else f"{type(error).__name__}: {error}"
                logger.warning("the reward of %r failed: %s", text[:80], what)
            found.append(None)
    return found


class _OutOfTime(BaseException):
    """A reward took too long. Code that goes on after any Exception, as a parser may, does not go on after this."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Context that raises _OutOfTime after `seconds`; outside the main thread there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _OutOfTime(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def advantages(rewards: Float[np.ndarray, "prompts group"], divide_by_std: bool) -> Float[np.ndarray, "prompts group"]:
    """Returns each text's reward minus its group's mean, over the group's standard deviation if asked for.

    Groups of equal rewards have exactly 0.
    """
    rewards = rewards.astype(np.float64)
    spread = rewards.max(axis=1, keepdims=True) > rewards.min(axis=1, keepdims=True)
    centred = np.where(spread, rewards - rewards.mean(axis=1, keepdims=True), 0)
    scale = np.where(spread, rewards.std(axis=1, keepdims=True), 1) if divide_by_std else 1
    return (centred / scale).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Grader:
    """Gives the texts of a rollout their advantages.

    Attributes:
      settings: the reward, and how advantages follow from it.
      examples: returns the example behind each row of prompts.
      to_text: returns the text of target tokens, up to its end.
    """

    settings: Rewards
    examples: Callable[[Batch], Sequence[Example]]
    to_text: Callable[[Sequence[int]], str]

    def grade(
        self, texts: Batch, in_text: Bool[np.ndarray, "batch length"], examples: Mapping[int, Example]
    ) -> tuple[Batch, dict[str, float]]:
        """Returns texts with advantages, and metrics of them; all processes must call it at the same time.

        "reward": the mean, without length penalties. "best_reward": the mean of the best of each group.
        "groups_without_spread": the share of groups whose rewards, less their penalties, are all equal, from which
        nothing is learned. "reward_failures": the share of rewards that failed. "length_penalty": the mean, if there is
        one. "text_length": tokens, with the end. "reward_seconds": time for all rewards.

        Args:
          texts: numpy, of all processes, groups together.
          in_text: see `ends.text_of`. (With one process nothing here runs on a device, where an update may be running.)
          examples: of the rows whose prompts this process read.
        """
        start = time.monotonic()
        rows = sorted(examples)
        written = [self.to_text(texts.tokens[row][in_text[row]].tolist()) for row in rows]
        judgement = judged(self.settings.reward, written, [examples[row] for row in rows], self.settings.seconds)
        penalty, lengths = self.settings.length_penalty, in_text.sum(axis=1)
        penalties = np.zeros(len(rows), np.float32)
        if penalty is not None:
            penalties = penalty.of(lengths[rows], np.array([not text.strip() for text in written], bool))
        found = np.full((3, len(texts.tokens)), -np.inf, np.float32)
        found[:, rows] = (*judgement, penalties)
        # Processes that share rows may disagree about a time limit; they must not about an advantage.
        everywhere = np.reshape(multihost_utils.process_allgather(found), (-1, *found.shape))
        rewards, failed, penalties = everywhere.max(axis=0)
        groups = rewards.reshape(-1, self.settings.group_size)
        compared = groups - penalties.reshape(groups.shape)
        metrics = {
            "reward": float(rewards.mean()),
            "best_reward": float(groups.max(axis=1).mean()),
            "groups_without_spread": float((compared.max(axis=1) == compared.min(axis=1)).mean()),
            "reward_failures": float(failed.mean()),
            "text_length": float(lengths.mean()),
            "reward_seconds": time.monotonic() - start,
        }
        if penalty is not None:
            metrics["length_penalty"] = float(penalties.mean())
        return texts.replace(advantage=advantages(compared, self.settings.divide_by_std).ravel()), metrics


def make_grader(settings: Rewards, dataset: SeqioDataset) -> Grader:
    """Returns the grader of texts for the prompts of a data set, whose split it reads."""
    examples = Examples(dataclasses.replace(dataset, batch_size=1024))
    return Grader(settings, examples.of, dataset.to_text)
