"""A `Harness` with lm-evaluation-harness's interface: texts in, texts and numbers out."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_t5x.data import stop_strings
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.harness import Harness, Rows, Tokens

if TYPE_CHECKING:
    import lm_eval.api.instance
    import lm_eval.api.model

logger = logging.getLogger(__name__)

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LIMIT = 256  # the harness's own


def adapt(harness: Harness, vocabulary: AnyVocabulary, rows: Rows, chat: Chat | None = None) -> "lm_eval.api.model.LM":
    """Returns the model as an object that `lm_eval.simple_evaluate` takes.

    Args:
      harness: the model.
      vocabulary: its vocabulary.
      rows: as the harness's.
      chat: contexts are conversations in this format; None for texts as they are.
    """
    from lm_eval import utils
    from lm_eval.api.model import LM

    Requests = Sequence["lm_eval.api.instance.Instance"]

    class Adapter(LM):
        """See `Harness`."""

        def loglikelihood(self, requests: Requests) -> list[tuple[float, bool]]:
            if chat:
                pairs = [chat.encode_continued(*request.args) for request in requests]
            else:
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
            ids = [chat.encode_prompt(text)[0] if chat else vocabulary.encode(text) for text, _ in asked]
            limits = [_limit(settings) for _, settings in asked]
            stops = [_until(settings) for _, settings in asked]

            def is_enough(number: int, tokens: Tokens) -> bool:
                return stop_strings.stopped(vocabulary.decode(tokens), stops[number])

            written = harness.write(list(zip(ids, limits, strict=True)), is_enough if any(stops) else None)
            texts = zip(map(vocabulary.decode, written), stops, strict=True)
            return [stop_strings.trim(text, until).text for text, until in texts]

        @property
        def tokenizer_name(self) -> str:
            """Tells the harness's caches of requests apart."""
            return token_ids(vocabulary).fingerprint

        def chat_template(self, chat_template: bool | str = False) -> str:
            return chat.template.text if chat and chat_template else ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            assert chat is not None, "the harness was not asked for chats"
            try:
                if add_generation_prompt:
                    return chat.template.render(chat_history, add_generation_prompt=True)
                return chat.template.unfinished(chat_history)
            except ValueError as error:
                hint = " Leave out --system_instruction." if chat_history[0]["role"] == "system" else ""
                raise UserError(f"A request cannot be written as a conversation: {error}{hint}") from error

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


def _until(settings: Mapping[str, Any]) -> list[str]:
    """Returns the stop strings of a request; empty ones stop nothing."""
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _warn_of_sampling(settings: Sequence[Mapping[str, Any]]) -> None:
    ignored = {
        f"{name} = {value}"
        for asked in settings
        for name, value in asked.items()
        if name not in ("until", *_LIMITS) and value
    }
    if ignored:
        logger.warning("generation_kwargs that the decoder ignores: %s", ", ".join(sorted(ignored)))
