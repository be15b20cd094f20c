"""Pieces of an answer joined are its text, however the tokens come; and engines make room for each other."""

import random

import open_models
import pytest

from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.data import stop_strings, vocabulary_files
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.slots import Finished
from diffusion_t5x.serving.answers import Answer
from diffusion_t5x.serving.refusals import Refusal
from diffusion_t5x.serving.worker import Engines, Text, Writing, Written

SPECIALS = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}


def byte_level(folder):
    return open_models.save_tokenizer(folder, open_models.byte_level(), **SPECIALS)


def byte_fallback(folder):
    tokenizer = open_models.sentencepiece_like()
    return open_models.save_tokenizer(folder, tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def sentencepiece(folder):
    return open_models.save_sentencepiece(folder / "model")


@pytest.fixture(params=[byte_level, byte_fallback, sentencepiece], ids=lambda kind: kind.__name__)
def prompts(request, tmp_path):
    vocabulary = vocabulary_files.vocabulary(request.param(tmp_path))
    return Prompts(vocabulary, False, None, 1, "decoder_only")


def texts_of(prompts, rng):
    """Tokens of texts, maybe with an end, and of bytes that are no text.

    Not the latter with byte fallback: there, a byte that is no text changes what was written of those before it.
    """
    vocabulary = prompts.vocabulary
    is_stable = vocabulary.vocab_size != 300 or vocabulary.bos_id is None
    while True:
        tokens = list(vocabulary.encode(rng.choice([*open_models.TEXTS, "é☃ 🙂🙂 ü", " a  b ", "…"])))
        if is_stable and rng.randrange(2):
            tokens += [rng.randrange(3, vocabulary.vocab_size) for _ in range(rng.randrange(6))]
            rng.shuffle(tokens)
        if rng.randrange(3) == 0:
            tokens.insert(rng.randrange(len(tokens)), vocabulary.eos_id)
        yield tokens


def test_pieces_joined_are_the_text(prompts):
    rng = random.Random(0)
    ends = {prompts.vocabulary.eos_id, prompts.vocabulary.pad_id}
    for _, tokens in zip(range(300), texts_of(prompts, rng), strict=False):
        whole = prompts.to_text(tokens)
        places = sorted(rng.randrange(len(whole) + 1) for _ in range(2)) if whole else [0, 0]
        stops = [whole[slice(*places)] or "§"] if rng.randrange(2) else []
        expected = stop_strings.trim(whole, stops)
        answer, said, written = Answer(0, prompts, stops, None, left_to_right=True), [], 0
        while not answer.is_finished:
            written += rng.randint(1, 4)
            is_end = written >= len(tokens)
            news = Written(tokens, None) if is_end else Writing(tokens, written)
            said.append(answer.add(news))
        assert "".join(piece.text for piece in said) == expected.text, (tokens, stops)
        has_end = bool(ends & set(tokens))
        assert said[-1].finish_reason == ("stop" if expected.stopped or has_end else "length")
        assert all(piece.finish_reason is None for piece in said[:-1])


def test_a_canvas_is_said_when_it_is_whole(prompts):
    tokens = list(prompts.vocabulary.encode(open_models.TEXTS[0]))
    answer = Answer(0, prompts, ["model"], None, left_to_right=False)
    assert answer.add(Writing(tokens, len(tokens))).text == ""
    last = answer.add(Written(tokens, None))
    assert last.text == prompts.to_text(tokens).partition("model")[0] and last.finish_reason == "stop"


class Echo:
    """An engine whose rows are finished after two calls."""

    def __init__(self):
        self.rows = {}

    def submit(self, ident, row, *, seed, sample):
        self.rows[ident] = 0

    def cancel(self, ident):
        self.rows.pop(ident, None)

    def advance(self):
        for ident in list(self.rows):
            self.rows[ident] += 1
            if self.rows.get(ident) == 2:
                del self.rows[ident]
                yield Finished(ident, None)


def text(top_k):
    return Text(None, AutoregressiveDecoder(top_k=top_k), seed=0, sample=0)


def test_idle_engines_make_room_and_busy_ones_do_not():
    made = []
    engines = Engines(lambda decoder: made.append(decoder.top_k) or Echo())
    texts = [text(n) for n in (1, 2, 3, 4)]
    for each in texts:
        engines.submit(each)
    with pytest.raises(Refusal) as refused:
        engines.submit(text(5))
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "1"}
    engines.submit(text(1))  # has an engine
    assert list(engines.advance()) == []
    engines.cancel(texts[1])
    assert {event.ident for event in engines.advance()} >= {texts[0], texts[2], texts[3]}
    assert list(engines.advance()) == []
    engines.submit(text(5))  # in place of the one that was used longest ago
    engines.submit(text(1))
    engines.submit(text(2))
    assert made == [1, 2, 3, 4, 5, 2]


def test_an_engine_that_goes_while_others_advance_is_passed_over():
    engines = Engines(lambda decoder: Echo())
    texts = [text(n) for n in (1, 2, 3, 4)]
    for each in texts:
        engines.submit(each)
    list(engines.advance())
    first = None
    for event in engines.advance():
        if first is None:
            first = event.ident
            for each in texts:
                engines.cancel(each)
            for n in (5, 6, 7, 8):
                engines.submit(text(n))
    assert first in texts
