"""Responses in the shape of OpenAI's: whole, and as pieces of a stream."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from diffusion_t5x.serving.answers import Piece, Token
from diffusion_t5x.serving.tools import Call


@dataclasses.dataclass(frozen=True)
class Usage:
    """Numbers of tokens of a request: of its prompts, and of all its answers."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "total_tokens": self.prompt_tokens + self.completion_tokens}


class Completions:
    """Responses of /v1/completions.

    Args:
      model: the model's name.
    """

    whole_object = piece_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str):
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """Returns the response of finished answers, each with its whole text."""
        choices = [self._choice(answer) for answer in answers]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage.as_json()}

    def start(self, index: int) -> dict[str, Any] | None:
        """Returns what a stream sends before an answer's first piece."""
        return None

    def piece(self, piece: Piece, canvas: list[str] | None) -> dict[str, Any]:
        """Returns a piece of a stream; with the texts of the canvas's tokens, if they are asked for."""
        choice = self._new_choice(piece)
        if canvas is not None:
            choice["canvas"] = canvas
        return {**self._head, "object": self.piece_object, "choices": [choice]}

    def end(self, usage: Usage) -> dict[str, Any]:
        """Returns the last piece of a stream that counts tokens."""
        return {**self._head, "object": self.piece_object, "choices": [], "usage": usage.as_json()}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        scores = None if piece.scores is None else _completion_scores(piece.scores)
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": scores,
            "finish_reason": piece.finish_reason,
        }

    def _new_choice(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece)


class Chats(Completions):
    """Responses of /v1/chat/completions."""

    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def start(self, index: int) -> dict[str, Any] | None:
        choices = [_delta(index, {"role": "assistant", "content": ""})]
        return {**self._head, "object": self.piece_object, "choices": choices}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        content = piece.text or None if piece.calls else piece.text
        message = {"role": "assistant", "content": content, "refusal": None}
        return {
            "index": piece.index,
            "message": {**message, "tool_calls": _calls(piece.calls)} if piece.calls else message,
            "logprobs": None if piece.scores is None else _chat_scores(piece.scores),
            "finish_reason": piece.finish_reason,
        }

    def _new_choice(self, piece: Piece) -> dict[str, Any]:
        new: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            new["tool_calls"] = [{"index": number, **call} for number, call in enumerate(_calls(piece.calls))]
        choice = _delta(piece.index, new, piece.finish_reason)
        return choice if piece.scores is None else {**choice, "logprobs": _chat_scores(piece.scores)}


def _calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": dataclasses.asdict(call)} for call in calls
    ]


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _completion_scores(tokens: Sequence[Token]) -> dict[str, list[Any]]:
    texts = [_text(token.text) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.log_probability for token in tokens],
        "top_logprobs": [{_text(text): score for text, score in token.likely} for token in tokens],
        "text_offset": [sum(map(len, texts[:number])) for number in range(len(texts))],
    }


def _chat_scores(tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(text: bytes, score: float) -> dict[str, Any]:
        return {"token": _text(text), "logprob": score, "bytes": list(text)}

    content = [
        {**entry(token.text, token.log_probability), "top_logprobs": [entry(*one) for one in token.likely]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
