"""Reads prompts and writes answers: as lines of text, or in a terminal that shows the canvas."""

import concurrent.futures
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator

from diffusion_t5x import terminal
from diffusion_t5x.chat.answers import Answers
from diffusion_t5x.chat.live_canvas import LiveCanvas
from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError


@dataclasses.dataclass(frozen=True)
class Plain:
    """Writes only answers to standard output, as plain text; on a terminal, symbols replace control characters.

    Attributes:
      prompts: converts texts to rows.
      answers: answers the rows.
      samples: number of answers to each prompt.
    """

    prompts: Prompts
    answers: Answers
    samples: int

    def run(self, prompt: str | None) -> None:
        """Answers the prompt; without one, answers standard input line by line."""
        is_alone = prompt is not None and self.samples == 1
        for number, text in enumerate(_lines() if prompt is None else [prompt]):
            try:
                batch = self.prompts.batch(text, number)
            except UserError as error:
                raise UserError(f"Line {number + 1}: {error}" if prompt is None else str(error)) from error
            for sample in range(self.samples):
                answer = self.answers.write(batch, sample)
                written = self.prompts.to_text(answer.tokens)
                written = written if is_alone else one_line(written)
                print(terminal.safe(written) if sys.stdout.isatty() else written, flush=True)
                say(answer.figures())


@dataclasses.dataclass(frozen=True)
class Terminal(Plain):
    """Answers in a terminal that shows the canvas while it is written.

    Attributes:
      canvas: draws it.
    """

    canvas: LiveCanvas

    def run(self, prompt: str | None) -> None:
        """Answers the prompt; without one, asks the user for prompts, which do not depend on each other."""
        if prompt is not None:
            self._answer(self.prompts.batch(prompt, 0))
            return
        for number, text in enumerate(iter(ask, None)):
            try:
                self._answer(self.prompts.batch(text, number))
            except UserError as error:
                say(str(error))

    def _answer(self, batch: Batch) -> str | None:
        """Shows the answers to a batch's row, and returns the first; None if the user has stopped one."""
        texts = []
        for sample in range(self.samples):
            # The main thread is free to hear Ctrl-C.
            with self.canvas.shown(batch), concurrent.futures.ThreadPoolExecutor(1) as worker:
                writing = worker.submit(self.answers.write, batch, sample)
                try:
                    answer = writing.result()
                except KeyboardInterrupt:
                    self.canvas.stop()
                    concurrent.futures.wait([writing])
                    answer = None
            if answer is None:
                print(self.canvas.picture().plain)
                say(f"stopped after {self.canvas.num_steps} passes of the model")
                return None
            texts.append(self.prompts.to_text(answer.tokens))
            print(terminal.safe(texts[-1]))
            say(answer.figures())
        return texts[0]


def one_line(text: str) -> str:
    r"""Returns the text on one line: `\n` and `\r` for line breaks, `\\` for a backslash."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"Standard input is not UTF-8: {error}.") from error


def ask(prefilled: str = "") -> str | None:
    """Returns a line that the user types in the terminal; None after an empty one or Ctrl-D. Ctrl-C begins it anew.

    Args:
      prefilled: what the line holds at first, where Python has readline.
    """
    with contextlib.suppress(ImportError):
        import readline  # lets a line be edited, and brings earlier ones back

        readline.set_startup_hook(lambda: readline.insert_text(prefilled))
    while True:
        try:
            return input("> ") or None
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Context in which Ctrl-C or a closed pipe ends the process at once, like any program in a pipe."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGPIPE)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Writes a line about an answer to standard error."""
    print(terminal.safe(text), file=sys.stderr, flush=True)
