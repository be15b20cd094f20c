"""Stop strings: a text ends before the first of them, also while it is still being written."""

import dataclasses
from collections.abc import Sequence

from diffusion_t5x.errors import UserError

INCOMPLETE = "\ufffd"  # stands for a part of a character


@dataclasses.dataclass(frozen=True)
class Trimmed:
    """The part of a text that may be shown.

    Attributes:
      text: everything before the stop string. Of a partial text, everything that no stop string can take back.
      stopped: the text has a stop string, so no more of it is needed.
    """

    text: str
    stopped: bool


def trim(text: str, stops: Sequence[str], partial: bool = False) -> Trimmed:
    """Cuts a text before the stop string that is complete first, read from left to right.

    Of two that are complete at the same character, the longer one counts. So the result does not depend on the pieces
    in which a text arrives: the `text` of a partial text is always the beginning of that of the whole.

    Args:
      text: the whole text, or its beginning.
      stops: the stop strings.
      partial: more of the text may follow. What may turn out to be the beginning of a stop string is held back.
    """
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    if found:
        return Trimmed(text[: min(found)[1]], stopped=True)
    held = max((_overlap(text, stop) for stop in stops), default=0) if partial else 0
    return Trimmed(text[: len(text) - held], stopped=False)


def stopped(text: str, stops: Sequence[str]) -> bool:
    """Returns True if the beginning of a text has a stop string, whatever follows.

    Args:
      text: the beginning; it may end within a character.
      stops: the stop strings.
    """
    return trim(text.rstrip(INCOMPLETE), stops).stopped


def check(stops: Sequence[str], setting: str) -> tuple[str, ...]:
    """Returns the stop strings; raises a UserError that names the setting if they are not texts or one is empty."""
    if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
        raise UserError(f"{setting} takes texts of at least one character, not {stops!r}.")
    return tuple(stops)


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of a text that begins a stop string, which is not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
