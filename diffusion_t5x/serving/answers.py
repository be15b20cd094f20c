"""Turns the tokens of a text into pieces of its answer, as they come."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.data import stop_strings
from diffusion_t5x.data.stop_strings import Trimmed
from diffusion_t5x.data.vocabularies import piece
from diffusion_t5x.serving import tools
from diffusion_t5x.serving.tools import Call, Tools
from diffusion_t5x.serving.worker import Writing, Written

FinishReason = Literal["stop", "length", "tool_calls"]

_LEAST = -9999.0  # JSON has no infinity


@dataclasses.dataclass(frozen=True)
class Token:
    """A token with its log-probability.

    Attributes:
      text: its bytes.
      log_probability: at temperature 1.
      likely: the likeliest tokens in its place, with theirs.
    """

    text: bytes
    log_probability: float
    likely: Sequence[tuple[bytes, float]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """The new part of an answer.

    Attributes:
      index: number of the answer in its request.
      text: text to append.
      finish_reason: why the answer ends with this piece; None if it goes on.
      canvas: all tokens of the canvas as they are now.
      scores: the answer's tokens; only in its last piece, if asked for.
      calls: functions that the model calls; only in the last piece.
    """

    index: int
    text: str
    finish_reason: FinishReason | None
    canvas: list[int]
    scores: list[Token] | None = None
    calls: Sequence[Call] = ()


class Answer:
    """An answer that grows.

    Args:
      index: number of the answer in its request.
      prompts: converts tokens to text.
      stops: strings before which a text ends.
      alternatives: number of likely tokens to list for each token; None: no log-probabilities. They come with the whole
        text, in one piece.
      left_to_right: tokens are written in order, and stay.
      offered: functions that the model may call; None: calls in its text are text.

    Attributes:
      num_tokens: number of tokens written, including the one that ends the text.
      is_finished: nothing is added any more.
    """

    def __init__(
        self,
        index: int,
        prompts: Prompts,
        stops: Sequence[str],
        alternatives: int | None,
        left_to_right: bool,
        offered: Tools | None = None,
    ):
        self._offered = offered
        self._index, self._prompts, self._stops, self._alternatives = index, prompts, stops, alternatives
        self._grows = left_to_right and alternatives is None
        self._end_ids = {*prompts.end_ids, prompts.vocabulary.eos_id, prompts.vocabulary.pad_id}
        self._text = ""
        self.num_tokens = 0
        self.is_finished = False

    def add(self, news: Writing | Written) -> Piece:
        """Returns what is new. The pieces' texts together are the answer's."""
        is_whole = isinstance(news, Written)
        if not is_whole and not self._grows:
            return Piece(self._index, "", None, news.tokens)
        written = news.tokens if isinstance(news, Written) else news.tokens[: news.num_written]
        kept = list(itertools.takewhile(lambda token: token not in self._end_ids, written))
        has_end = len(kept) < len(written)
        trimmed = self._trimmed(kept, is_whole or has_end)
        self.is_finished = is_whole or has_end or trimmed.stopped
        self.num_tokens = len(kept) + has_end
        text, calls = self._without_calls(trimmed.text)
        new = ""
        if self.is_finished or text.startswith(self._text):
            new, self._text = text[len(self._text) :], text
        reason: FinishReason | None = None
        if self.is_finished:
            reason = "tool_calls" if calls else "stop" if has_end or trimmed.stopped else "length"
        scores = self._scores(news, kept, trimmed) if isinstance(news, Written) and news.scores else None
        return Piece(self._index, new, reason, news.tokens, scores, calls)

    def _without_calls(self, text: str) -> tuple[str, Sequence[Call]]:
        """Returns the text before the calls of functions, and if the answer is finished, the calls."""
        if self._offered is None:
            return text, ()
        if self.is_finished:
            return self._offered.split(text)
        return stop_strings.trim(text, [tools.OPENS], partial=True).text, ()

    def _trimmed(self, tokens: Sequence[int], is_whole: bool) -> Trimmed:
        """Returns the text of tokens; of a text that goes on, without what may still change."""
        text = self._prompts.to_text(tokens)
        text = text if is_whole else text.rstrip(stop_strings.INCOMPLETE)
        return stop_strings.trim(text, self._stops, partial=not is_whole)

    def _scores(self, written: Written, kept: Sequence[int], trimmed: Trimmed) -> list[Token]:
        """Returns the tokens of the text, without those that belong to a stop string alone."""
        assert written.scores is not None and self._alternatives is not None
        if trimmed.stopped:
            begins = itertools.accumulate((len(cell) for cell in self._prompts.cells(kept)), initial=0)
            kept = [token for token, begin in zip(kept, begins, strict=False) if begin < len(trimmed.text)]
        vocabulary = self._prompts.vocabulary
        return [
            Token(
                piece(vocabulary, token),
                max(score, _LEAST),
                [(piece(vocabulary, one), max(each, _LEAST)) for one, each in likely[: self._alternatives]],
            )
            for token, score, likely in zip(kept, written.scores.written, written.scores.likely, strict=False)
        ]
