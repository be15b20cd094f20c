"""Answers requests: lays out their prompts, has them written, and limits how many wait."""

import asyncio
import collections
import dataclasses
import functools
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.rows import RowDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.serving import tools
from diffusion_t5x.serving.answers import Answer, Piece
from diffusion_t5x.serving.languages import Languages
from diffusion_t5x.serving.metrics import Metrics
from diffusion_t5x.serving.refusals import Refusal, busy
from diffusion_t5x.serving.requests import SAMPLING, Ask, Prompt
from diffusion_t5x.serving.responses import Usage
from diffusion_t5x.serving.worker import News, Text, Worker

_MOST_SECONDS = 60  # that a client is told to wait


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
      context: tokens of a prompt and its answer together; of an encoder-decoder, of each.
      most_inputs: tokens of a prompt; None sets no limit besides `context`.
      slots: texts that are written at the same time.
      queue: texts that may wait for a slot.
      body: bytes of a request.
    """

    context: int
    most_inputs: int | None
    slots: int
    queue: int
    body: int

    def fitted(self, row: Batch) -> Batch:
        """Returns a row without the empty slots behind it that are more than the context."""
        return jax.tree.map(lambda x: x[:, : self.context] if x.ndim == 2 else x, row)


class Service:
    """The model, as requests see it.

    Args:
      name: the model's name.
      prompts: converts texts to rows and tokens to texts, with the model's chat format if it has one; `length` is that
        of an answer if a request names none.
      decoder: writes the texts.
      limits: limits of the server.
      worker: has them written.
      metrics: counts them.
    """

    def __init__(
        self,
        name: str,
        prompts: Prompts,
        decoder: Decoder,
        limits: Limits,
        worker: Worker,
        metrics: Metrics,
    ):
        self.name, self.prompts, self.decoder, self.limits = name, prompts, decoder, limits
        self._worker, self._metrics = worker, metrics
        self._in_flight = 0
        self._finished: collections.deque[float] = collections.deque(maxlen=32)
        self._languages = Languages(prompts.vocabulary, prompts.end_ids)
        metrics.watch(self._num_running, self._num_waiting)

    @property
    def is_healthy(self) -> bool:
        return not self._worker.has_failed

    def texts(self, ask: Ask) -> tuple[list[Text], int]:
        """Returns the texts to write, and the number of tokens of the prompts.

        Takes time: it encodes the prompts.

        Raises:
          Refusal: what is asked for is not possible with this model.
        """
        if ask.model not in (None, self.name):
            message = f"There is no model {ask.model[:80]!a} here: this server has {self.name!a}."
            raise Refusal(message, "model", status=404, code="model_not_found")
        decoder, length = self._decoder(ask), ask.max_tokens or self.prompts.length
        if ask.alternatives is not None and not isinstance(decoder, AutoregressiveDecoder):
            raise Refusal(f"{type(decoder).__name__} gives no exact log-probabilities: leave logprobs out.", "logprobs")
        seed = secrets.randbits(31) if ask.seed is None else ask.seed
        rows = self._rows(ask, length)
        decoder = self._within(decoder, ask, length)
        scored = ask.alternatives is not None
        texts = [Text(row, decoder, seed, sample, scored) for row in rows for sample in range(ask.n)]
        return texts, sum(map(_num_inputs, rows))

    def open(self, ask: Ask, texts: Sequence[Text], prompt_tokens: int) -> "Reply":
        """Begins to write texts.

        Raises:
          Refusal: too many wait.
        """
        room = self.limits.slots + self.limits.queue
        if len(texts) > room:
            raise Refusal(f"The request asks for {len(texts)} texts; this server holds {room} at a time.", "n")
        if self._in_flight + len(texts) > room:
            message = f"{self._in_flight} texts are running or waiting, of at most {room}. Try again later."
            raise busy(message, self._seconds_to_wait())
        in_order = isinstance(self.decoder, RowDecoder) and self.decoder.in_order
        how = ask.stop, ask.alternatives, in_order, ask.tools
        answers = [Answer(number, self.prompts, *how) for number in range(len(texts))]
        self._in_flight += len(texts)
        self._metrics.prompt_tokens.inc(prompt_tokens)
        return Reply(self, self._worker, texts, answers, prompt_tokens)

    def leave(self, answer: Answer) -> None:
        """Gives back the room of an answer that is finished or cancelled."""
        self._in_flight -= 1
        self._metrics.completion_tokens.inc(answer.num_tokens)
        self._finished.append(time.monotonic())

    def _num_running(self) -> int:
        return min(self._in_flight, self.limits.slots)

    def _num_waiting(self) -> int:
        return max(0, self._in_flight - self.limits.slots)

    def _seconds_to_wait(self) -> int:
        """Estimates when the texts that wait now will have begun, from how fast the last ones have finished."""
        if len(self._finished) < 2:
            return 1
        each = (self._finished[-1] - self._finished[0]) / (len(self._finished) - 1)
        return max(1, min(_MOST_SECONDS, math.ceil(each * self._num_waiting())))

    def sampling(self) -> dict[str, float | None]:
        """Returns the settings of the decoder that a request may change, and their values."""
        holders = {name: _holder(self.decoder, name) for name in SAMPLING}
        return {name: getattr(holder, name) for name, holder in holders.items() if holder is not None}

    def _decoder(self, ask: Ask) -> Decoder:
        """Returns the decoder with a request's sampling."""
        decoder: Any = self.decoder
        for name, value in ask.sampling.items():
            holder = _holder(decoder, name)
            if holder is None:
                raise Refusal(f"{type(decoder).__name__} has no {name}: leave it out.", name)
            try:
                changed = dataclasses.replace(holder, **{name: value})
                decoder = changed if holder is decoder else dataclasses.replace(decoder, inner=changed)
            except UserError as error:
                raise Refusal(f"{name}={value:g} is refused: {error}", name) from error
        return decoder

    def _within(self, decoder: Decoder, ask: Ask, length: int) -> Decoder:
        """Returns the decoder, writing only what an answer may be."""
        form = ask.tools if ask.tools and ask.tools.required else ask.form
        if form is None:
            return decoder
        try:
            language = self._languages(form)
            language.check_fits([length], "Set a larger max_tokens.")
            return decoder.within(language)
        except UserError as error:
            raise Refusal(str(error), form.param) from error

    def _rows(self, ask: Ask, length: int) -> list[Batch]:
        """Returns a row for each prompt."""
        self._check_length(0, length)  # before room is made for them
        prompts = dataclasses.replace(self.prompts, max_inputs=None, length=length)
        try:
            if ask.messages is None:
                rows = [self._row(prompt, number, prompts) for number, prompt in enumerate(ask.prompts)]
            elif prompts.chat is None:
                raise UserError(f"{self.name} has no chat template beside its tokenizer: use /v1/completions.")
            else:
                rows = [prompts.answering(ask.messages, 0, self._variables(ask, prompts.chat))]
        except UserError as error:
            raise Refusal(str(error), "prompt" if ask.messages is None else "messages") from error
        for row in rows:
            self._check_length(_num_inputs(row), length)
        return [self.limits.fitted(row) for row in rows]

    def _variables(self, ask: Ask, chat: Chat) -> dict[str, Any]:
        """Returns the variables of the chat template that a request sets."""
        if ask.tools is None:
            return {}
        if "tools" not in chat.template.names:
            raise Refusal(f"The chat template of {self.name} knows no tools: leave them out.", "tools")
        if ask.tools.required and not chat.template.has(tools.OPENS):
            raise Refusal(
                f"The chat template of {self.name} has calls in another form than {tools.OPENS}, so none can be "
                'required: set tool_choice to "auto".',
                "tool_choice",
            )
        return {"tools": ask.tools.tools}

    def _row(self, prompt: Prompt, number: int, prompts: Prompts) -> Batch:
        if isinstance(prompt, str):
            return dataclasses.replace(prompts, chat=None).batch(prompt, number)
        size = prompts.vocabulary.vocab_size
        if wrong := [token for token in prompt if not 0 <= token < size]:
            raise UserError(f"The prompt has the token id {wrong[0]}; the model's are 0 to {size - 1}.")
        return prompts.row(prompt, number)

    def _check_length(self, num_inputs: int, length: int) -> None:
        limits, is_apart, code = self.limits, self.prompts.architecture == "encoder_decoder", "context_length_exceeded"
        takes = f"This server takes {limits.context} tokens of {'each' if is_apart else 'prompt and answer together'}"
        if length > limits.context:
            raise Refusal(f"The answer may have {length} tokens (max_tokens). {takes}.", "max_tokens", code=code)
        most = limits.context if is_apart else limits.context - length
        most = most if limits.most_inputs is None else min(most, limits.most_inputs)
        if num_inputs > most:
            message = (
                f"The prompt has {num_inputs} tokens and the answer may have {length} (max_tokens). {takes}, and "
                f"{most} of the prompt. Nothing is truncated: shorten the prompt or set a smaller max_tokens."
            )
            raise Refusal(message, "prompt", code=code)


def _holder(decoder: Any, name: str) -> Any:
    """Returns the decoder that has a setting: this one, or the one that it writes blocks with. None if neither has."""
    holders = (decoder, getattr(decoder, "inner", None))
    return next((each for each in holders if hasattr(each, name)), None)


def _num_inputs(row: Batch) -> int:
    """Returns the number of tokens of a row's prompt."""
    given = row.input_mask if row.encoder_segment_ids is None else row.encoder_segment_ids > 0
    return int(np.sum(given))


class Reply:
    """The answers to a request, while they are written. It must be closed, however it ends.

    Attributes:
      num_answers: number of answers.
    """

    def __init__(
        self, service: Service, worker: Worker, texts: Sequence[Text], answers: Sequence[Answer], prompt_tokens: int
    ):
        self.num_answers = len(answers)
        self._service, self._worker, self._prompt_tokens = service, worker, prompt_tokens
        self._open = dict(zip(texts, answers, strict=True))
        self._answers = answers
        self._news: asyncio.Queue[tuple[Text, News]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        for text in texts:
            worker.write(text, functools.partial(self._hear, text))

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, sum(answer.num_tokens for answer in self._answers))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields pieces of all answers, until each has its last one.

        Raises:
          Refusal: the server cannot go on.
        """
        while self._open:
            text, news = await self._news.get()
            answer = self._open.get(text)
            if answer is None:
                continue
            if isinstance(news, Refusal):
                raise news
            piece = answer.add(news)
            if answer.is_finished:
                self._leave(text)
            yield piece

    def close(self) -> None:
        """Cancels what is not written yet."""
        for text in list(self._open):
            self._leave(text)

    def _leave(self, text: Text) -> None:
        answer = self._open.pop(text)
        self._worker.cancel(text)
        self._service.leave(answer)

    def _hear(self, text: Text, news: News) -> None:
        """Called by the worker's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.put_nowait, (text, news))
