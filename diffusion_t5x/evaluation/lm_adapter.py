"""A `Harness` with lm-evaluation-harness's interface: texts in, texts and numbers out."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.harness import Harness, Rows, Tokens

if TYPE_CHECKING:
    import lm_eval.api.instance
    import lm_eval.api.model

logger = logging.getLogger(__name__)

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LIMIT = 256  # the harness's own


def adapt(harness: Harness, vocabulary: AnyVocabulary, rows: Rows) -> "lm_eval.api.model.LM":
    """Returns the model as an object that `lm_eval.simple_evaluate` takes."""
    from lm_eval import utils
    from lm_eval.api.model import LM

    Requests = Sequence["lm_eval.api.instance.Instance"]

    class Adapter(LM):
        """See `Harness`."""

        def loglikelihood(self, requests: Requests) -> list[tuple[float, bool]]:
            pairs = [_encode_pair(vocabulary, *request.args, apart=rows.context_eos) for request in requests]
            return list(zip(harness.log_likelihoods(pairs), harness.are_greedy(pairs), strict=True))

        def loglikelihood_rolling(self, requests: Requests) -> list[float]:
            if not rows.are_free:
                raise UserError(
                    "Rolling log-likelihoods, of documents of any length, need a decoder-only model without a target "
                    "canvas, such as an autoregressive one. Leave out tasks with output_type: loglikelihood_rolling."
                )
            windows = []
            for number, request in enumerate(requests):
                tokens = vocabulary.encode(request.args[0])
                size = rows.row_length - 1 - rows.context_eos  # besides the token before
                for window in utils.get_rolling_token_windows(tokens, _NOTHING, size, context_len=1):
                    context, predicted = utils.make_disjoint_window(window)
                    windows.append((number, ([token for token in context if token != _NOTHING], predicted)))
            sums = [0.0] * len(requests)
            found = harness.log_likelihoods([pair for _, pair in windows])
            for (number, _), log_likelihood in zip(windows, found, strict=True):
                sums[number] += log_likelihood
            return sums

        def generate_until(self, requests: Requests) -> list[str]:
            asked = [request.args for request in requests]
            _warn_of_sampling([settings for _, settings in asked])
            written = harness.write([(vocabulary.encode(context), _limit(settings)) for context, settings in asked])
            texts = zip(map(vocabulary.decode, written), asked, strict=True)
            return [_cut(text, settings.get("until") or []) for text, (_, settings) in texts]

    return Adapter()


_NOTHING = -1  # in place of the token that the harness puts before a document: the model has a start token of its own


def _encode_pair(vocabulary: AnyVocabulary, context: str, continuation: str, *, apart: bool) -> tuple[Tokens, Tokens]:
    """Returns the tokens of context and continuation; spaces between them go to the continuation, as in the harness.

    Args:
      vocabulary: encodes the texts.
      context, continuation: the request's texts.
      apart: encode them as separate texts; otherwise the continuation is what the whole text has after the context.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before = vocabulary.encode(kept)
    if apart:
        return before, vocabulary.encode(continuation)
    return before, vocabulary.encode(kept + continuation)[len(before) :]


def _limit(settings: Mapping[str, Any]) -> int:
    return int(next((settings[name] for name in _LIMITS if settings.get(name) is not None), _DEFAULT_LIMIT))


def _cut(text: str, until: str | Sequence[str]) -> str:
    """Returns the text up to the first stop string."""
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.partition(stop)[0]
    return text


def _warn_of_sampling(settings: Sequence[Mapping[str, Any]]) -> None:
    ignored = {
        f"{name} = {value}"
        for asked in settings
        for name, value in asked.items()
        if name not in ("until", *_LIMITS) and value
    }
    if ignored:
        logger.warning("generation_kwargs that the decoder ignores: %s", ", ".join(sorted(ignored)))
