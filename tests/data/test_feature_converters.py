"""The converters against row-building in plain numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tf = pytest.importorskip("tensorflow")

from diffusion_t5x.data.feature_converters import DecoderOnlyConverter, EncoderDecoderConverter  # noqa: E402

LENGTHS = {"inputs": 5, "targets": 6}
ROW = 11
# Token 0 is content as any other: padding is known by its segment, never by its value.
EXAMPLES = st.lists(
    st.tuples(st.lists(st.integers(0, 50), max_size=5), st.lists(st.integers(0, 50), max_size=6)),
    min_size=1,
    max_size=ROW,  # SeqIO packs groups of as many examples as a row is long
)


def convert(examples, lengths=LENGTHS, converter=DecoderOnlyConverter, **layout):
    def generate():
        for inputs, targets in examples:
            yield {"inputs": inputs, "targets": targets} if "inputs" in lengths else {"targets": targets}

    spec = {name: tf.TensorSpec([None], tf.int32) for name in lengths}
    ds = tf.data.Dataset.from_generator(generate, output_signature=spec)
    return list(converter("inputs" in lengths, **layout)(ds, lengths).as_numpy_iterator())


def row(segments, length=ROW, pad_id=0):
    """Tokens, target mask, segments and positions of examples one after another."""
    made = {
        "tokens": np.full(length, pad_id),
        "target_mask": np.zeros(length, bool),
        "segment_ids": np.zeros(length, int),
        "positions": np.zeros(length, int),
    }
    place = 0
    for number, (inputs, targets) in enumerate(segments, start=1):
        for position, token in enumerate([*inputs, *targets]):
            made["tokens"][place] = token
            made["target_mask"][place] = position >= len(inputs)
            made["segment_ids"][place] = number
            made["positions"][place] = position
            place += 1
    return made


def assert_rows(got, wanted):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@settings(max_examples=10, deadline=None)
@given(EXAMPLES)
def test_plain_rows(examples):
    assert_rows(convert(examples), [row([example]) for example in examples])


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(EXAMPLES, st.sampled_from([0, 7]))
def test_canvas_is_as_long_as_the_targets_may_be(examples, pad_id):
    wanted = [row([(i, t + [pad_id] * (6 - len(t)))], pad_id=pad_id) for i, t in examples]
    assert_rows(convert(examples, canvas=True, pad_id=pad_id), wanted)
    assert all(one["target_mask"].sum() == 6 for one in wanted)


@settings(max_examples=8, deadline=None)
@given(EXAMPLES)
def test_packing_keeps_every_token_and_keeps_examples_apart(examples):
    rows, free = [[]], ROW
    for example in examples:  # the next example that does not fit starts a new row
        size = len(example[0]) + len(example[1])
        if size > free:
            rows, free = [*rows, []], ROW
        if size:
            rows[-1].append(example)
        free -= size
    assert_rows(convert(examples, pack=True), [row(segments) for segments in rows])


def test_packing_many_examples_loses_none():
    rng = np.random.default_rng(0)
    examples = [tuple(rng.integers(0, 50, rng.integers(1, 6)).tolist() for _ in range(2)) for _ in range(100)]
    found = []
    for one in convert(examples, pack=True):
        for segment in range(1, one["segment_ids"].max() + 1):
            where = one["segment_ids"] == segment
            found.append(tuple(one["tokens"][where & (one["target_mask"] == kind)].tolist() for kind in (False, True)))
    assert found == examples


def test_without_inputs_every_position_is_a_target():
    examples = [([], [3, 4, 1]), ([], [5, 1])]
    assert_rows(convert(examples, {"targets": 6}), [row([example], 6) for example in examples])
    assert_rows(convert(examples, {"targets": 6}, pack=True), [row(examples, 6)])
    assert_rows(convert(examples, {"targets": 6}, canvas=True)[1:], [row([([], [5, 1, 0, 0, 0, 0])], 6)])


def apart(segments):
    """As `row`, inputs and targets each in a row of their own."""
    encoder = row([(inputs, []) for inputs, _ in segments], LENGTHS["inputs"])
    made = row([([], targets) for _, targets in segments], LENGTHS["targets"])
    return made | {f"encoder_{name}": encoder[name] for name in ("tokens", "segment_ids", "positions")}


@settings(max_examples=10, deadline=None)
@given(EXAMPLES)
def test_rows_of_an_encoder_decoder(examples):
    found = convert(examples, converter=EncoderDecoderConverter)
    assert_rows(found, [apart([example]) for example in examples])
    canvas = [(inputs, targets + [0] * (6 - len(targets))) for inputs, targets in examples]
    found = convert(examples, converter=EncoderDecoderConverter, canvas=True)
    assert_rows(found, [apart([example]) for example in canvas])


@settings(max_examples=10, deadline=None)
@given(EXAMPLES)
@pytest.mark.slow
def test_packing_for_an_encoder_decoder_gives_inputs_and_targets_of_an_example_one_segment(examples):
    rows, free = [[]], (5, 6)
    for example in examples:
        sizes = tuple(map(len, example))
        if sizes[0] > free[0] or sizes[1] > free[1]:
            rows, free = [*rows, []], (5, 6)
        rows[-1].append(example)
        free = (free[0] - sizes[0], free[1] - sizes[1])
    found = convert(examples, converter=EncoderDecoderConverter, pack=True)
    assert_rows(found, [apart(segments) for segments in rows])
