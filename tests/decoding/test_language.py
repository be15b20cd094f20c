"""Languages as automata over tokens, against enumeration, and what is refused."""

import itertools

import numpy as np
import pytest
import spelled

from diffusion_t5x.data.plain_vocabularies import ByteVocabulary, TokenIdVocabulary
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.structured import checked, language_of
from diffusion_t5x.errors import UserError

pytest.importorskip("outlines_core")

PATTERNS = ["(ab){1,2}", "ab1|ba|ä+", "(a|b)*1?", "a*b[1ä]", ".*", "^(ab)+$", "(aab|a)*", "a|", "", "a|c|1[b-f]*"]


def rows_of(language, length):
    """All rows of tokens that the automaton accepts."""
    found = [(language.start, ())]
    for _ in range(length):
        found = [
            (target, (*row, token))
            for state, row in found
            for source, label, target in zip(language.source, language.label, language.target, strict=True)
            if source == state
            for token in np.flatnonzero(language.class_of == label).tolist()
        ]
    return {row for state, row in found if language.shortest[state] == 0}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_accepts_just_the_texts_and_their_padding(pattern):
    language = Language(pattern, spelled.SHORT)
    for length in (1, 3):
        expected = {tuple(row) for row in spelled.allowed(pattern, spelled.SHORT, length).tolist()}
        assert rows_of(language, length) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_knows_which_lengths_it_fits(pattern):
    language = Language(pattern, spelled.SHORT)
    for length in range(4):
        for exactly in (False, True):
            has_text = len(spelled.allowed(pattern, spelled.SHORT, length, ends=not exactly)) > 0
            if has_text:
                language.check_fits([length], "", exactly=exactly)
            else:
                with pytest.raises(UserError, match="No text of"):
                    language.check_fits([length], "", exactly=exactly)


def test_other_tokens_may_end_a_text_and_are_none_of_it():
    one = 6  # the token "1", as if it ended a turn
    language = Language("ab1?", spelled.SHORT, end_ids=(one,))
    assert rows_of(language, 2) == {(3, 4), (3, 9), (5, 0), (5, 1), (5, one)}
    assert {row[1:] for row in rows_of(language, 3) if row[0] == 5} == set(itertools.product((0, 1, one), repeat=2))
    assert language != Language("ab1?", spelled.SHORT) and language == Language("ab1?", spelled.SHORT, end_ids=[one])


def test_languages_are_equal_by_pattern_and_vocabulary():
    first, second = Language("^a$", spelled.SHORT), Language("a", spelled.SHORT)
    assert first == second and hash(first) == hash(second)
    assert first != Language("b", spelled.SHORT) and first != Language("a", ByteVocabulary())


class Spaced(spelled.Pieces):
    """Puts a space in front of texts, as SentencePiece does, and has a space that is a byte."""

    puts_space = True

    def _to_bytes(self, ids):
        return super()._to_bytes(ids) if list(ids) == [4] else super()._to_bytes(ids).removeprefix(b" ")


def test_a_text_begins_with_the_space_of_its_vocabulary():
    vocabulary = Spaced(b" ", b" ", b" a", b"a", b"a a")
    whole, part = Language("a( a)?", vocabulary), Language("a( a)?", vocabulary, begins=False)
    assert rows_of(whole, 1) == {(5,)}
    assert rows_of(whole, 3) >= {(3, 6, 5), (3, 7, 1), (5, 3, 6)} and not any(4 in row for row in rows_of(whole, 3))
    assert rows_of(part, 1) == {(6,), (7,)}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "error building NFA"),
        ("(?=a)b", "no look-around"),
        ("c+", "can be spelled"),
        ("[^ab1ä]", "can be spelled"),
    ],
)
def test_a_pattern_without_texts_is_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        Language(pattern, spelled.SHORT)


def test_a_vocabulary_without_texts_is_refused():
    with pytest.raises(UserError, match="has ids and no texts"):
        Language("a", TokenIdVocabulary(10, 1))


def test_a_text_has_one_form():
    with pytest.raises(UserError, match="not both"):
        language_of("a", {"type": "null"}, spelled.SHORT)
    assert language_of(None, None, spelled.SHORT) is None


def test_batches_are_checked_row_by_row():
    import tiny

    language = Language("ab1?", spelled.SHORT, begins=False)
    batch = tiny.one_a_row([([3], [3] * 2), ([3, 4], [3]), ([3], [])])
    with pytest.raises(UserError, match="--length"):
        list(checked(Language("bab", spelled.SHORT), [(batch, None)]))
    assert list(checked(language, [(batch, None)])) == [(batch, None)]
    holes = batch.replace(target_mask=np.array([[True] * 3, [True, True, False], [False] * 3]))
    with pytest.raises(UserError, match="hole larger"):
        list(checked(Language("aaa", spelled.SHORT), [(holes, None)], in_holes=True))
