"""The first difference between two decodings of a text, and how narrowly the first one decided it."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoded, Decoder
from diffusion_t5x.evaluation.model_views import Nudge

Step = dict[int, tuple[int, float]]
"""The tokens that a step wrote, by slot, and the probability that the model gave to each (NaN if unknown)."""

_LEAST, _MOST = -20, 6  # powers of two, in nats, between which a margin is searched
_REFINED = 4  # halvings of the last factor of two: to within 5 %


@dataclasses.dataclass(frozen=True)
class Text:
    """A decoded text and how it came about.

    Attributes:
      tokens: of the targets, ended where the text ends.
      steps: what each step wrote that changed anything; None if the decoder does not tell.
    """

    tokens: tuple[int, ...]
    steps: Sequence[Step] | None

    @classmethod
    def of(cls, decoder: Decoder, decoded: Decoded, row: int, batch: Batch) -> "Text":
        """Returns a row's text from a decoder's output, numpy."""
        slots = np.flatnonzero(batch.target_mask[row])
        return cls(tuple(decoded.tokens[row, slots].tolist()), _steps(decoder, decoded, row, slots))


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first step in which two decodings of a text did not write the same.

    Attributes:
      step: number of the step, counted from 0, of those that changed the text.
      slot: slot of the row in which the reference wrote; if it wrote nothing there, the other decoding did.
      token: the reference's token; None if it wrote nothing else than the other one.
      other_slot, other_token: the same of the other decoding.
    """

    step: int
    slot: int
    token: int | None
    other_slot: int
    other_token: int | None


@dataclasses.dataclass(frozen=True)
class Margin:
    """The margin by which a difference was decided.

    Attributes:
      nats: by how much log probabilities would have to be off for the reference to write what the other one wrote.
      is_exact: False if it is more than `nats`: a larger change of logits would change an earlier step first, or none
        that was tried is enough.
    """

    nats: float
    is_exact: bool = True


def first_difference(reference: Text, other: Text) -> Difference | None:
    """Returns where two decodings of a text part; None if they do not, or do not tell their steps."""
    if reference.steps is None or other.steps is None:
        return None
    nothing: Step = {}
    for number, (one, two) in enumerate(itertools.zip_longest(reference.steps, other.steps, fillvalue=nothing)):
        lost = [slot for slot in sorted(one) if slot not in two or one[slot][0] != two[slot][0]]
        gained = [slot for slot in sorted(two) if slot not in one or one[slot][0] != two[slot][0]]
        if lost or gained:
            both = [slot for slot in lost if slot in gained]
            lost, gained = both or lost, both or gained
            slot, other_slot = (lost or gained)[0], (gained or lost)[0]
            token, other_token = one.get(slot, (None,))[0], two.get(other_slot, (None,))[0]
            return Difference(number, slot, token, other_slot, other_token)
    return None


def largest_gap(reference: Text, other: Text) -> float | None:
    """Returns the largest difference between log probabilities of tokens that both wrote before they part, in nats.

    None if either does not tell its probabilities.
    """
    if reference.steps is None or other.steps is None:
        return None
    gap = None
    for one, two in zip(reference.steps, other.steps, strict=False):
        if {slot: token for slot, (token, _) in one.items()} != {slot: token for slot, (token, _) in two.items()}:
            break
        for slot, (_, probability) in one.items():
            pair = np.array([probability, two[slot][1]], np.float64)
            if (pair > 0).all():
                gap = max(gap or 0.0, float(np.abs(np.diff(np.log(pair)))[0]))
    return gap


def margin(
    reference: Text, difference: Difference, positions: np.ndarray, anywhere: bool, decode: Callable[[Nudge], Text]
) -> Margin:
    """Measures how narrowly the reference decided.

    The reference is decoded again with the logit of its token lowered and that of the other one's token raised, by
    less and less: the least change after which it writes what the other one wrote is the margin. Where it chooses
    the most likely token, that is the difference between the two log probabilities; draws, orders, thresholds, beams
    and decoders of a user's own are measured in the same way. Where tokens at two positions compete, it is the change
    of their own log probabilities.

    Args:
      reference: the reference's text.
      difference: from another text.
      positions: `[L]`, of the reference's slots in their segments.
      anywhere: change logits at all positions: for decoders that do not hand positions to the model.
      decode: returns the reference's text with nudged logits.
    """
    both = difference.token is not None and difference.other_token is not None
    share = 0.5 if both else 1.0

    def outcome(size: float) -> tuple[Literal["same", "there", "elsewhere"], Text]:
        tokens = [-1 if token is None else token for token in (difference.token, difference.other_token)]
        places = [-1 if anywhere else positions[slot] for slot in (difference.slot, difference.other_slot)]
        nudge = Nudge(*jnp.array([*tokens, *places], jnp.int32), *jnp.full(2, share * size, jnp.float32))
        text = decode(nudge)
        found = first_difference(reference, text)
        if found is None or found.step > difference.step:
            return "same", text
        return ("there" if _makes(difference, text, found) else "elsewhere"), text

    low, high = _LEAST - 1, _MOST + 1
    seen = {}
    while high - low > 1:
        middle = (low + high) // 2
        seen[middle] = outcome(2.0**middle)
        low, high = (middle, high) if seen[middle][0] == "same" else (low, middle)
    if high > _MOST:
        return Margin(2.0**_MOST, is_exact=False)
    below, above, (kind, text) = 2.0**low if low >= _LEAST else 0.0, 2.0**high, seen[high]
    for _ in range(_REFINED if below else 0):
        size = (below * above) ** 0.5
        now = outcome(size)
        if now[0] == "same":
            below = size
        else:
            above, (kind, text) = size, now
    if kind == "elsewhere":
        return Margin(below, is_exact=False)
    return Margin(_as_log_probability(reference, difference, text, share * above, above))


def _steps(decoder: Decoder, decoded: Decoded, row: int, slots: np.ndarray) -> list[Step] | None:
    """Returns what each step of a row wrote, by the decoder's kind."""
    confidence = None if decoded.trace is None else decoded.trace.confidence
    rule = getattr(decoder, "inner", decoder)
    order: np.ndarray | None = None
    if decoder.left_to_right:  # also drafts, whose numbers of steps differ without a difference of the text
        order = np.arange(len(slots))
    elif getattr(rule, "keeps_written", False):
        order = np.asarray(decoded.written_at[row, slots], np.int64)
        if (size := getattr(decoder, "block_size", None)) is not None:
            first = slots[0] if getattr(decoder, "blocks_from", "targets") == "targets" else 0
            order = order + (slots - first) // size * (len(slots) + 1)
    if order is not None:
        steps: dict[int, Step] = {}
        for slot, number in zip(slots.tolist(), order.tolist(), strict=True):
            if decoded.written_at[row, slot] >= 0:
                probability = np.nan if confidence is None else float(confidence[-1, row, slot])
                steps.setdefault(number, {})[slot] = (int(decoded.canvas[row, slot]), probability)
        return [steps[number] for number in sorted(steps)]
    if decoded.trace is None or confidence is None:
        return None
    states = decoded.trace.tokens[:, row]
    first = {slot: (int(states[0, slot]), np.nan) for slot in slots.tolist()}
    changes = [
        {
            slot: (int(states[number, slot]), float(confidence[number, row, slot]))
            for slot in slots[states[number, slots] != states[number - 1, slots]].tolist()
        }
        for number in range(1, len(states))
    ]
    return [first, *filter(None, changes)]


def _makes(difference: Difference, text: Text, found: Difference) -> bool:
    """Returns True if a text whose first difference from the reference was found has this one."""
    assert text.steps is not None
    if found.step != difference.step:
        return False
    step = text.steps[found.step] if found.step < len(text.steps) else {}
    wrote, wrote_other = (step.get(slot, (None,))[0] for slot in (difference.slot, difference.other_slot))
    if difference.other_token is not None:
        return wrote_other == difference.other_token
    return wrote != difference.token


def _as_log_probability(reference: Text, difference: Difference, text: Text, each: float, change: float) -> float:
    """Returns the change of log probabilities that a change of logits made.

    At one position the difference between two log probabilities is that between the logits. At two positions a
    logit's change of h moves its log probability by `h + log(1 - p + p exp(-h))`, where p is the probability before
    it is lowered, or after it is raised.
    """
    if difference.slot == difference.other_slot and None not in (difference.token, difference.other_token):
        return change
    assert reference.steps is not None and text.steps is not None
    moved = 0.0
    for token, slot, steps in (
        (difference.token, difference.slot, reference.steps),
        (difference.other_token, difference.other_slot, text.steps),
    ):
        if token is not None:
            probability = steps[difference.step][slot][1]
            moved += each + float(np.log1p(probability * np.expm1(-each)))
    return moved
