"""Arguments and results of the Python API."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import traces
from diffusion_t5x.reporting.trace_page import trace_page


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of a text under a model, including the token that ends it.

    Attributes:
      nats: log-probability of the text; exact for an autoregressive model, otherwise an estimate of a lower bound.
      standard_error: standard error of that estimate, in nats; 0 if it is exact.
      num_tokens: number of tokens in the text, including the one that ends it.
    """

    nats: float
    standard_error: float
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps in which an answer was written. Notebooks display it as a page that plays the steps.

    Attributes:
      prompt: the prompt.
      text: the answer.
      canvases: the canvas before the first step and after each one: ▢ is MASK, ¶ the end of the text, · padding.
      record: the record that `infer --trace` writes, see `evaluation.traces.compact`.
      decoder: the decoder that wrote the answer, as text.
    """

    prompt: str
    text: str
    canvases: list[str]
    record: Mapping[str, Any] = dataclasses.field(repr=False)
    decoder: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return "\n".join(map(traces.sign, self.canvases))

    def html(self) -> str:
        """Returns a self-contained HTML page that plays the steps."""
        return trace_page([self.record], 1, "prompt", self.decoder)

    def _repr_html_(self) -> str:
        frame = 'sandbox="allow-scripts" style="width: 100%; height: 30em; border: 0"'
        return f'<iframe srcdoc="{html.escape(self.html())}" {frame}></iframe>'


def as_example(prompt: str) -> dict[str, Any]:
    """Returns the example of a prompt."""
    return {"inputs_pretokenized": prompt}


def as_texts(given: str | Sequence[str]) -> list[str]:
    """Returns one text or several as a list; raises a UserError if they are not texts."""
    texts = [given] if isinstance(given, str) else list(given)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"Texts are str, or a list of str; got {wrong[0]!r}.")
    return texts


def as_pairs(texts: str | Sequence[str], inputs: str | Sequence[str]) -> list[tuple[str, str]]:
    """Pairs each text with its inputs."""
    several = as_texts(texts)
    each = [inputs] * len(several) if isinstance(inputs, str) else as_texts(inputs)
    if len(each) != len(several):
        raise UserError(f"There are {len(several)} texts, but {len(each)} inputs: give one for each, or one for all.")
    return list(zip(several, each, strict=True))
