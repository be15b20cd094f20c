"""A vocabulary of a few pieces of several bytes each, models over it, and all that a language allows of it."""

import dataclasses
import itertools
import re

import numpy as np
import tiny

from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary import ReadVocabulary
from diffusion_t5x.models.transformer import ModelDefinition


class Pieces(ReadVocabulary):
    """Pad, EOS, an unknown token and these pieces; MASK comes behind them."""

    unk_id, puts_space = 2, False

    def __init__(self, *pieces: bytes):
        self._pieces = pieces
        self.vocab_size = 3 + len(pieces)
        self.contents = repr(pieces).encode()

    def is_text(self):
        return np.arange(self.vocab_size) >= 3

    def piece(self, token):
        return self._pieces[token - 3] if token >= 3 else [b"<pad>", b"</s>", b"<unk>"][token]

    def encode_part(self, text, begins):
        """Returns the longest piece at each place."""
        rest, ids = text.encode(), []
        while rest:
            piece = max(filter(rest.startswith, self._pieces), key=len)
            ids.append(3 + self._pieces.index(piece))
            rest = rest[len(piece) :]
        return ids

    def _to_bytes(self, ids):
        return b"".join(self.piece(token) for token in ids if token >= 3)


SHORT = Pieces(b"a", b"b", b"ab", b"1", b"\xc3", b"\xa4", b"b1")


def make_model(vocabulary, config=tiny.RELATIVE, seed=0):
    """A model with random parameters, whose probabilities are far from even."""
    ids = token_ids(vocabulary)
    definition = ModelDefinition(dataclasses.replace(config, vocab_size=ids.size), ids)
    return definition, tiny.random_params(definition, seed)


def allowed(pattern, vocabulary, length, ends=True):
    """All rows of tokens, int `[rows, length]`, that spell a text of the pattern and, if it may end, its padding."""
    tokens = range(vocabulary.vocab_size) if ends else range(3, vocabulary.vocab_size)
    found = []
    for row in itertools.product([token for token in tokens if token != vocabulary.unk_id], repeat=length):
        end = next((at for at, token in enumerate(row) if token < 2), length)
        text = b"".join(map(vocabulary.piece, row[:end]))
        try:
            matches = re.fullmatch(pattern, text.decode())
        except UnicodeDecodeError:
            continue
        if matches and max(row[end:], default=0) < 2:
            found.append(row)
    return np.array(found)
