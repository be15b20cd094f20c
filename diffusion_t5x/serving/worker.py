"""The thread that owns the device: it feeds engines with texts to write, and tells what they have written."""

import dataclasses
import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterator

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.slots import Finished, Progress
from diffusion_t5x.serving.engine import Engine, Event
from diffusion_t5x.serving.refusals import Refusal, busy, failed
from diffusion_t5x.serving.scores import Scorer, Scores

logger = logging.getLogger(__name__)

_MOST_ENGINES = 4  # each has its own programs and its own cache of keys and values


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A text to write.

    Attributes:
      row: a batch of one row.
      decoder: writes it.
      seed: random seed.
      sample: number of the text among those of one prompt; each draws from a key of its own.
      scored: compute its tokens' log-probabilities.
    """

    row: Batch
    decoder: Decoder
    seed: int
    sample: int
    scored: bool = False


@dataclasses.dataclass(frozen=True)
class Written:
    """A finished text.

    Attributes:
      tokens: the targets' tokens, up to the end of the text.
      scores: their log-probabilities, if asked for.
    """

    tokens: list[int]
    scores: Scores | None


@dataclasses.dataclass(frozen=True)
class Writing:
    """A text that is being written.

    Attributes:
      tokens: all of the targets' tokens as they are now.
      num_written: number of them that are written.
    """

    tokens: list[int]
    num_written: int


News = Writing | Written | Refusal
Listener = Callable[[News], None]


class Engines:
    """An engine for each decoder that requests ask for; those that are idle make room for others.

    Args:
      make: returns the engine of a decoder.
    """

    def __init__(self, make: Callable[[Decoder], Engine]):
        self._make = make
        self._engines: dict[Decoder, Engine] = {}
        self._texts: dict[Text, Decoder] = {}

    def submit(self, text: Text) -> None:
        """Queues a text.

        Raises:
          Refusal: all engines are busy with other decoders' texts.
        """
        engine = self._engines.pop(text.decoder, None)
        if engine is None:
            if len(self._engines) >= _MOST_ENGINES:
                idle = self._engines.keys() - set(self._texts.values())
                if not idle:
                    raise busy(
                        f"{_MOST_ENGINES} other settings of temperature, top_p, top_k and the form of an answer are "
                        "in use. Try again, or leave them out.",
                        seconds=1,
                    )
                del self._engines[next(decoder for decoder in self._engines if decoder in idle)]
            engine = self._make(text.decoder)
        self._engines[text.decoder] = engine  # last: the least recently used is first
        engine.submit(text, text.row, seed=text.seed, sample=text.sample)
        self._texts[text] = text.decoder

    def cancel(self, text: Text) -> None:
        """Drops a text."""
        if decoder := self._texts.pop(text, None):
            self._engines[decoder].cancel(text)

    def advance(self) -> Iterator[Event]:
        """Advances each engine that has texts."""
        for decoder in set(self._texts.values()):
            engine = self._engines.get(decoder)  # it may have become idle, and made room, since the last event
            for event in engine.advance() if engine else ():
                if event.ident in self._texts:
                    if isinstance(event, Finished):
                        del self._texts[event.ident]
                    yield event


class Worker(threading.Thread):
    """Runs the engines. Listeners are called in this thread.

    Args:
      engines: decode the texts.
      scorer: computes log-probabilities; None if they are not exact.
      on_failure: called when the engines have failed, after which every text is refused.
    """

    def __init__(self, engines: Engines, scorer: Scorer | None, on_failure: Callable[[], None]):
        super().__init__(name="decoding", daemon=True)
        self._engines, self._scorer, self._on_failure = engines, scorer, on_failure
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[Text, Listener] = {}
        self._closing = False
        self.has_failed = False

    def write(self, text: Text, listener: Listener) -> None:
        """Queues a text; the listener is told what becomes of it, last a `Written` or a `Refusal`."""
        self._commands.put(functools.partial(self._write, text, listener))

    def cancel(self, text: Text) -> None:
        """Drops a text. Its listener hears no more of it, but for what is on its way."""
        self._commands.put(functools.partial(self._cancel, text))

    def close(self) -> None:
        """Ends the thread when all texts are written, and waits for that."""
        self._commands.put(self._close)
        self.join()

    def run(self) -> None:
        while not self._closing or self._listeners:
            try:
                self._obey(wait=not self._listeners)
                if self._listeners:
                    self._advance()
            except Exception:
                logger.exception("Decoding failed.")
                self._fail()

    def _advance(self) -> None:
        for event in self._engines.advance():
            self._tell(event)
            self._obey(wait=False)

    def _obey(self, wait: bool) -> None:
        """Carries out commands, after waiting for the first one if asked to."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            command()
            wait = False

    def _write(self, text: Text, listener: Listener) -> None:
        if self.has_failed:
            listener(_failure())
            return
        try:
            self._engines.submit(text)
        except Refusal as refusal:
            listener(refusal)
        else:
            self._listeners[text] = listener

    def _cancel(self, text: Text) -> None:
        if self._listeners.pop(text, None):
            self._engines.cancel(text)

    def _close(self) -> None:
        self._closing = True

    def _tell(self, event: Event) -> None:
        text = event.ident
        assert isinstance(text, Text)
        listener = self._listeners.get(text)
        if listener is None:
            return
        targets = text.row.target_mask[0]
        if isinstance(event, Progress):
            listener(Writing(event.tokens[targets].tolist(), event.num_written))
            return
        scores = None
        if text.scored:
            assert self._scorer is not None
            scores = self._scorer(text.row, event.decoded)
        num_tokens = int(event.decoded.num_tokens[0])
        del self._listeners[text]  # not before: if anything fails above, it must hear of it
        listener(Written(event.decoded.tokens[0, targets].tolist()[:num_tokens], scores))

    def _fail(self) -> None:
        self.has_failed = True
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener(_failure())
        self._on_failure()


def _failure() -> Refusal:
    return failed("Decoding failed; the server's log says why.")
