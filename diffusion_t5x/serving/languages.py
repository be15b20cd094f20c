"""Compiles the forms of answers in a process of its own, so that a large one stops neither the server nor the host."""

import functools
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Collection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.errors import UserError
from diffusion_t5x.serving.forms import Form
from diffusion_t5x.serving.refusals import busy
from diffusion_t5x.serving.tools import Tools

_MOST_LANGUAGES = 32  # kept of those that requests have asked for
_SECONDS_TO_START = 120
_MEND = "Give it fewer repetitions: smaller numbers in {}, maxLength and maxItems."


class Languages:
    """Compiles forms, one at a time; keeps the last ones.

    The process begins with the first form, and ends with this one.

    Args:
      vocabulary, end_ids: see `Language`.
      seconds: time limit for a form.
      most_bytes: memory limit of the process.
    """

    def __init__(
        self, vocabulary: AnyVocabulary, end_ids: Collection[int], seconds: float = 20, most_bytes: int = 4 * 2**30
    ):
        self._given, self._seconds = (vocabulary, end_ids, most_bytes), seconds
        self._lock = threading.Lock()
        self._child: tuple[SpawnProcess, Connection] | None = None
        self._compiled = functools.lru_cache(_MOST_LANGUAGES)(self._compile)

    def __call__(self, form: Form | Tools) -> Language:
        """Returns the texts of a form. Any thread may call it.

        Raises:
          UserError: it cannot be kept, has no text, or takes too much time or memory.
          Refusal: others are being compiled all the time.
        """
        if not self._lock.acquire(timeout=self._seconds):
            raise busy("The forms of other requests are being compiled. Try again later.", seconds=5)
        try:
            return self._compiled(pickle.dumps(form))
        finally:
            self._lock.release()

    def _compile(self, form: bytes) -> Language:
        if self._child is None or not self._child[0].is_alive():
            self._child = self._start()
        process, connection = self._child
        try:
            connection.send_bytes(form)
            if not connection.poll(self._seconds):
                process.kill()
                process.join()
                self._child = None
                raise UserError(f"The form of the answer takes more than {self._seconds:g} s to compile. {_MEND}")
            found = connection.recv()
        except (EOFError, ConnectionError) as error:
            process.join()
            self._child = None
            if process.exitcode != -signal.SIGABRT:
                raise RuntimeError(f"Compiling a form ended with status {process.exitcode}.") from error
            found = UserError(f"The form of the answer takes too much memory to compile. {_MEND}")  # Rust aborts then
        if isinstance(found, UserError):
            raise found
        return found

    def _start(self) -> tuple[SpawnProcess, Connection]:
        """Starts the process, and waits until it is ready."""
        context = multiprocessing.get_context("spawn")  # a fork would copy JAX's locks without its threads
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, *self._given), name="languages", daemon=True)
        process.start()
        there.close()
        if not here.poll(_SECONDS_TO_START):
            process.kill()
            raise busy("The forms of answers cannot be compiled at the moment. Try again later.", seconds=5)
        here.recv()
        return process, here


def _work(connection: Connection, vocabulary: AnyVocabulary, end_ids: Collection[int], most_bytes: int) -> None:
    """Compiles what comes, until the other end is closed."""
    import resource  # Unix

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends it
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(
        resource.RLIMIT_DATA, (most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard), hard)
    )
    connection.send("ready")
    while True:
        try:
            form = connection.recv()
        except EOFError:
            return
        try:
            connection.send(Language(form.pattern(), vocabulary, end_ids=end_ids))
        except UserError as error:
            connection.send(error)
        except MemoryError:
            signal.raise_signal(signal.SIGABRT)
