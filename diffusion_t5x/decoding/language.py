"""The texts that a decoder may write, given by a regular expression, as an automaton over a vocabulary's tokens."""

import types
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from diffusion_t5x.data.plain_vocabularies import Ids
from diffusion_t5x.data.vocabularies import TokenIds, token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary, Vocabulary, own
from diffusion_t5x.decoding.groups import Groups
from diffusion_t5x.errors import UserError

_END = -1  # the state after the token that ends a text
_MARK = "\U0010ffff"  # Unicode's last code point, which is no character
_SYNTAX = "The syntax is that of Rust's regex crate: no look-around, no back-references."


class Language:
    """An automaton over tokens that accepts the texts of a regular expression, whole, and pads them.

    The text may be followed by a token that ends it, and then by nothing but such tokens. Tokens with the same
    transitions from every state are one class. Languages are equal if pattern and vocabulary are; hashable, so that a
    decoder may have one. Arrays are on the host, int32.

    Attributes:
      pattern: the regular expression.
      start: the state before the first token.
      class_of: class of each id `[ids]`; -1 if the id is in no text.
      tokens: the ids in groups, one a class.
      source, label, target: state, class and next state of each transition, `[transitions]`.
      transitions: transitions in groups, one a state.
      labels, targets: the same as rows, one a state, `[states, most]`; -1 for none.
      shortest: number of tokens from each state to the end of the shortest text, `[states]`.
    """

    def __init__(self, pattern: str, vocabulary: AnyVocabulary, begins: bool = True, end_ids: Collection[int] = ()):
        """Compiles a regular expression.

        Args:
          pattern: a regular expression.
          vocabulary: its tokens write the texts.
          begins: the text is a whole one, as `encode` makes it; otherwise a part of one, as `encode_part` makes it.
          end_ids: tokens that end a text, beside EOS and pad; see `TokenIds`.

        Raises:
          UserError: it is invalid, the vocabulary has no texts, or its tokens spell no text of the language.
        """
        known, ids = own(vocabulary), token_ids(vocabulary)
        if isinstance(known, Ids):
            raise UserError(
                f"The vocabulary is a {type(vocabulary).__name__}, which has ids and no texts: neither --regex nor "
                "--json_schema can be met. Give the model's tokenizer."
            )
        pattern = _without_anchors(pattern)
        ends = {ids.eos_id: _END, ids.pad_id: _END, **dict.fromkeys(sorted(end_ids), _END)}
        self.pattern, self._identity = pattern, (pattern, ids.fingerprint, begins, frozenset(ends))
        start, accepting, moves = _compile(pattern, known, ids, ends.keys(), begins and known.puts_space)
        for state in accepting:
            moves.setdefault(state, {}).update(ends)
        moves[_END] = ends
        shortest = _shortest(moves, {*accepting, _END})
        if start not in shortest:
            raise UserError(f"No text of {_shown(pattern)} can be spelled with the tokens of the vocabulary.")
        self._index(start, moves, shortest, ids.size)

    def _index(
        self, start: int, moves: Mapping[int, Mapping[int, int]], shortest: Mapping[int, int], num_ids: int
    ) -> None:
        """Sets the tables, of the states from which a text can be ended."""
        number = {state: index for index, state in enumerate(shortest)}
        self.start, self._end = number[start], number[_END]
        self.shortest = np.array(list(shortest.values()), np.int32)
        rows: list[tuple[np.ndarray, np.ndarray]] = []  # of each state: ids, and their next states
        classes = np.zeros(num_ids, np.int64)
        for state in number:
            tokens = np.fromiter(moves[state].keys(), np.int64)
            ends, which = np.unique(np.fromiter(moves[state].values(), np.int64), return_inverse=True)
            ends = np.array([number.get(end, -1) for end in ends.tolist()], np.int64)[which]
            tokens, ends = tokens[ends >= 0], ends[ends >= 0]
            rows.append((tokens, ends))
            # Two ids stay in one class as long as no state tells them apart.
            moved = np.zeros(num_ids, np.int64)
            moved[tokens] = ends + 1
            _, classes = np.unique(classes * (len(number) + 1) + moved, return_inverse=True)
        live = np.zeros(num_ids, bool)
        live[np.concatenate([tokens for tokens, _ in rows])] = True
        names, renamed = np.unique(classes[live], return_inverse=True)
        self.class_of = np.full(num_ids, -1, np.int32)
        self.class_of[live] = renamed
        triples = [
            np.unique(np.stack([np.full_like(ends, state), self.class_of[tokens], ends]), axis=1)
            for state, (tokens, ends) in enumerate(rows)
        ]
        self.source, self.label, self.target = np.concatenate(triples, axis=1).astype(np.int32)
        self.tokens = Groups.of(self.class_of, len(names))
        self.transitions = Groups.of(self.source, len(number))
        sizes = np.bincount(self.source, minlength=len(number))
        column = np.arange(len(self.source)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self.labels, self.targets = (np.full((len(number), sizes.max()), -1, np.int32) for _ in range(2))
        self.labels[self.source, column], self.targets[self.source, column] = self.label, self.target

    def check_fits(self, lengths: Iterable[int], what: str, *, exactly: bool = False) -> None:
        """Raises a UserError if no text fits one of these numbers of tokens.

        Args:
          lengths: numbers of tokens to be written.
          what: where they are, and the setting that mends it, for the message.
          exactly: the text takes all of them, as in a hole; otherwise it may end sooner.
        """
        fewest = int(self.shortest[self.start])
        for length in sorted(set(lengths)):
            if fewest > length:
                raise UserError(
                    f"No text of {_shown(self.pattern)} fits {length} tokens: the shortest takes {fewest}. {what}"
                )
            if exactly and not self._has_text_of(length):
                raise UserError(f"No text of {_shown(self.pattern)} is exactly {length} tokens long. {what}")

    def _has_text_of(self, length: int) -> bool:
        """Returns True if a text has exactly `length` tokens, not counting one that ends it."""
        in_text = self.target != self._end
        reached = np.arange(len(self.shortest)) == self.start
        for _ in range(length):
            after = np.zeros_like(reached)
            after[self.target[in_text & reached[self.source]]] = True
            reached = after
        return bool((reached & (self.shortest == 0)).any())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Language) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        return f"Language({self.pattern!r})"


def library() -> types.ModuleType:
    """Returns the library outlines-core; raises a UserError if it is not installed."""
    try:
        import outlines_core
        import outlines_core.json_schema
    except ImportError as error:
        raise UserError(
            "--regex and --json_schema need the library outlines-core: pip install 'diffusion_t5x[structured]'."
        ) from error
    return outlines_core


def _compile(
    pattern: str, vocabulary: Vocabulary, ids: TokenIds, ends: Collection[int], after_space: bool
) -> tuple[int, set[int], dict[int, dict[int, int]]]:
    """Returns the first state, the accepting ones, and the next state by state and id; `ends` lead nowhere."""
    outlines_core = library()
    ids_of: dict[bytes, list[int]] = {}
    for token in set(ids.noise_ids().tolist()).difference(ends):
        piece = vocabulary.piece(token)
        # The space in front of a text is a piece; as a byte it would be the text's own.
        if piece and not (after_space and piece == b" " and vocabulary.decode([token])):
            ids_of.setdefault(piece, []).append(token)
    # A mark ends each text, so that no text begins another: where one does, outlines-core 0.2 loses the way between.
    # All bytes are tokens, for it refuses a pattern with any character that the vocabulary cannot spell.
    mark, unused, byte = ids.size, ids.size + 1, ids.size + 2
    others = {bytes([value]): [byte + value] for value in range(256) if bytes([value]) not in ids_of}
    whole = f"{' ' if after_space else ''}(?:{pattern}){_MARK}"
    try:
        spelled = outlines_core.Vocabulary(unused, {**ids_of, **others, _MARK.encode(): [mark]})
        index = outlines_core.Index(whole, spelled)
    except (ValueError, TypeError) as error:
        raise UserError(f"The regular expression {_shown(pattern)} is refused: {error}. {_SYNTAX}") from error
    ends, start, moves = set(index.get_final_states()), index.get_initial_state(), index.get_transitions()
    accepting = {state for state, row in moves.items() if row.get(mark) in ends}
    reached: dict[int, dict[int, int]] = {}
    queue = [start]
    for state in queue:
        if state not in reached:
            reached[state] = {token: end for token, end in moves.get(state, {}).items() if token < ids.size}
            queue += set(reached[state].values())
    return start, accepting & reached.keys(), reached


def _shown(pattern: str) -> str:
    """Returns a pattern for a message; one made from a JSON schema may be pages long."""
    return repr(pattern if len(pattern) <= 200 else f"{pattern[:150]}...{pattern[-47:]}")


def _without_anchors(pattern: str) -> str:
    """Returns a pattern without "^" in front and "$" at the end, which say nothing about a whole text."""
    pattern = pattern.removeprefix("^")
    backslashes = len(pattern[:-1]) - len(pattern[:-1].rstrip("\\"))
    return pattern[:-1] if pattern.endswith("$") and backslashes % 2 == 0 else pattern


def _shortest(moves: Mapping[int, Mapping[int, int]], accepting: set[int]) -> dict[int, int]:
    """Returns the number of tokens to the nearest accepting state, for states that reach one; nearest first."""
    before: dict[int, set[int]] = {}
    for state, row in moves.items():
        for end in set(row.values()):
            before.setdefault(end, set()).add(state)
    found = dict.fromkeys(sorted(accepting), 0)
    queue = list(found)
    for state in queue:
        for earlier in sorted(before.get(state, ())):
            if earlier not in found:
                found[earlier] = found[state] + 1
                queue.append(earlier)
    return found
