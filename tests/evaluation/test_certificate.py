"""The certificate finds what depends on a text's neighbours, and tells rounding from a fault by the margin."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from faulty_decoders import DrawsByRow, Neighbours
from plain_decoding import PlainDecoding, gumbel
from variants import quick

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.drafts import DraftingDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.decoding.windows import WindowDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import certificate, model_views
from diffusion_t5x.evaluation.certificate import Comparison, Differing, Ways
from diffusion_t5x.evaluation.margins import Margin, Text, first_difference
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.masks import Slots
from diffusion_t5x.models.streams import stream

LENGTH = 6
ROWS = [
    tiny.one_a_row([example], 10, first_id=number)
    for number, example in enumerate(tiny.random_examples(3, [(3, LENGTH), (1, LENGTH), (4, LENGTH)]))
]
DECODERS = {
    "ar": AutoregressiveDecoder(),
    "masked": MaskedDecoder(num_steps=3),
    "masked, drawn": MaskedDecoder(num_steps=3, temperature=1.0),
    "block": BlockDecoder(3, MaskedDecoder(num_steps=2)),
    "sundae": SundaeDecoder(num_steps=3, num_samples=2, temperature=0.5),
    "uniform block": BlockDecoder(3, SundaeDecoder(num_steps=2, num_samples=1, temperature=0.5)),
    "windows": WindowDecoder(window=3),
    "beams": BeamSearchDecoder(2),
    "self-speculation": SelfSpeculationDecoder(BlockDecoder(3, MaskedDecoder(num_steps=1))),
    "drafts": DraftingDecoder(block_size=3),
}
ONE_WAY = {"masked", "masked, drawn", "sundae"}


def ways(decoder, dtype="float32", config=tiny.RELATIVE, rows=ROWS):
    return Ways(*tiny.make_model(config), decoder, rows, dtype)


def of_way(found, way):
    (comparison,) = [comparison for comparison in found if comparison.way == way]
    return comparison


@pytest.mark.parametrize("name", quick(DECODERS, {"ar"}))
def test_texts_of_all_ways_are_those_alone(name):
    found = list(ways(DECODERS[name]).compare())
    assert [comparison.way for comparison in found] == [
        "in a batch of 3",
        "reversed, 32 slots wider",
        "in slots",
        "on all devices",
        "without a cache",
    ]
    mesh = of_way(found, "on all devices")
    assert mesh.verdict == "not possible" and mesh.reason == "this machine has one device (cpu)"
    assert ("begin together" in (of_way(found, "in slots").reason or "")) == (name in ("windows", "beams"))
    assert ("one way to read" in (of_way(found, "without a cache").reason or "")) == (name in ONE_WAY)
    done = [comparison for comparison in found if comparison.reason is None]
    if name == "windows":  # its cache is stale: the texts may differ from those of whole rows, and that is no fault
        stale = done.pop()
        assert stale.way == "without a cache" and stale.bound is None and stale.verdict in ("same", "expected")
    for comparison in done:
        assert comparison.num_texts == 3 and comparison.verdict == "same", comparison
        assert comparison.gap is None if comparison.way == "in slots" else 0 <= comparison.gap < 1e-4
    assert done[0].gap > 0 or done[1].gap > 0  # the passes have other shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "decoder"),
    [
        (tiny.ENCODER_DECODER, AutoregressiveDecoder(temperature=1.0)),
        (dataclasses.replace(tiny.RELATIVE, shifted=True), DECODERS["block"]),
        (tiny.GPT2, BlockDecoder(3, MaskedDecoder(num_steps=2), blocks_from="row")),
    ],
    ids=["encoder-decoder", "shifted", "blocks from the row's beginning"],
)
def test_other_models(config, decoder):
    rows = ROWS
    if config is tiny.ENCODER_DECODER:
        examples = tiny.random_examples(3, [(3, LENGTH), (1, LENGTH)])
        rows = [tiny.pack_apart([[example]], 5, LENGTH, first_id=number) for number, example in enumerate(examples)]
    found = [each for each in ways(decoder, config=config, rows=rows).compare() if each.reason is None]
    assert len(found) == 4 and all(each.verdict == "same" and each.num_texts == len(rows) for each in found)


@pytest.mark.slow
def test_texts_on_eight_devices(eight_devices):
    program = pathlib.Path(__file__).parents[1] / "helpers" / "certify_on_eight.py"
    done = subprocess.run([sys.executable, program], env=eight_devices, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    spread, rows_alone = json.loads(done.stdout)
    assert spread["mesh"] == {"fsdp": 8} and rows_alone["mesh"] == {"data": 8}
    for found in (spread, rows_alone):
        assert found["verdict"] == "same" and found["num_texts"] == 3 and 0 <= found["gap"] < 1e-4


def test_a_decoder_that_reads_its_neighbour_is_found():
    faulty = ways(Neighbours(num_steps=3))
    found = next(faulty.compare())
    assert found.verdict == "fault" and found.way == "in a batch of 3" and found.largest_margin > 0.1
    for text in found.differing:
        assert text.reference != text.other and text.first is not None and text.margin is not None
    assert not [text for text in found.differing if text.margin.nats < 1e-3]


def test_a_leak_too_small_to_change_a_text_is_found_by_the_probabilities():
    found = next(ways(Neighbours(num_steps=3, share=0.01)).compare())
    assert found.differing == () and found.gap > found.bound and found.verdict == "fault"


@pytest.mark.slow
def test_draws_by_the_row_s_number_are_a_fault_that_no_probability_shows():
    found = next(ways(DrawsByRow(num_steps=LENGTH, order="sequential", temperature=1.0)).compare())
    assert found.verdict == "fault" and len(found.differing) == 2 and found.largest_margin > 1e-2


@pytest.mark.parametrize("name", quick(["greedy", "drawn"], {"greedy"}))
def test_a_margin_is_what_the_second_choice_lacks(name):
    """Beside whole passes in plain steps, of a text that has the second choice in place of the first."""
    definition, params = tiny.make_model()
    drawn = MaskedDecoder(num_steps=LENGTH, order="sequential", temperature=1.0)
    decoder = AutoregressiveDecoder() if name == "greedy" else drawn
    way, place = Ways(definition, params, decoder, ROWS, "float32"), 2
    number = int(np.argmax([len(text.steps) for text in way.alone]))
    row, alone = ROWS[number], way.alone[number]
    canvas = np.where(row.target_mask, definition.vocabulary.mask_id, row.tokens)
    for step in alone.steps[:place]:
        for at, (token, _) in step.items():
            canvas[0, at] = token
    ((slot, (token, _)),) = alone.steps[place].items()
    logits = np.array(PlainDecoding(definition, params, decoder, row, 0).read(canvas))[0, slot]
    logits[definition.vocabulary.mask_id] = logits[definition.vocabulary.size :] = -np.inf
    if name == "drawn":
        key = jax.random.fold_in(jax.random.key(0), row.example_ids[0])
        key = stream(jax.random.fold_in(stream(key, "steps"), place), "tokens")
        logits += np.asarray(gumbel(key, len(row.tokens[0]), len(logits)))[row.positions[0, slot]]
    second, first = np.argsort(logits)[-2:]
    assert token == first
    other = Text(alone.tokens, [*alone.steps[:place], {slot: (int(second), np.nan)}])
    measured = way.margin(number, first_difference(alone, other))
    expected = float(logits[first] - logits[second])
    assert measured.is_exact and measured.nats == pytest.approx(expected, rel=0.06)


def test_what_differs_between_number_types_is_reported_and_no_fault():
    first, second = ways(DECODERS["masked"]), ways(DECODERS["masked"], "bfloat16")
    found = second.beside(first)
    assert found.bound is None and found.verdict in ("same", "expected")
    assert (found.dtype, found.way) == ("float32", "alone in bfloat16")
    assert 1e-3 < found.gap < 0.5


def test_a_verdict_follows_from_the_margins():
    def verdict(*margins, gap=None, bound=1e-3):
        texts = tuple(Differing(n, (1,), (2,), None, size and Margin(size)) for n, size in enumerate(margins))
        return Comparison("float32", "way", 3, texts, gap, bound).verdict

    assert verdict() == "same" and verdict(gap=1e-6) == "same" and verdict(gap=2e-3) == "fault"
    assert verdict(1e-6) == "rounding" and verdict(1e-6, 2e-3) == "fault" and verdict(None) == "fault"
    assert verdict(3.0, bound=None) == "expected" and verdict(bound=None) == "same"
    assert Comparison("float32", "way", reason="no").verdict == "not possible"
    more = Differing(0, (1,), (2,), None, Margin(1e-6, is_exact=False))
    assert Comparison("float32", "way", 3, (more,), None, 1e-3).verdict == "fault"


def test_a_difference_is_the_first_step_that_differs():
    def text(*steps):
        return Text((), [{slot: (token, 0.5) for slot, token in step.items()} for step in steps])

    one = text({3: 7}, {4: 8, 5: 9}, {6: 1})
    assert first_difference(one, one) is None and first_difference(one, Text((), None)) is None
    cases = {
        (1, 5, 9, 5, 2): text({3: 7}, {4: 8, 5: 2}, {6: 1}),  # another token
        (1, 5, 9, 6, 1): text({3: 7}, {4: 8, 6: 1}, {5: 9}),  # another place
        (1, 5, 9, 5, None): text({3: 7}, {4: 8}, {5: 9, 6: 1}),  # fewer
        (1, 6, None, 6, 1): text({3: 7}, {4: 8, 5: 9, 6: 1}),  # more
        (2, 6, 1, 6, None): text({3: 7}, {4: 8, 5: 9}),  # ended before
    }
    for expected, other in cases.items():
        found = first_difference(one, other)
        assert dataclasses.astuple(found) == expected


def test_bounds_follow_the_precision_of_products(monkeypatch):
    assert certificate.rounding_bound("float32") == 1e-3 and certificate.rounding_bound("bfloat16") == 0.5
    with jax.default_matmul_precision("bfloat16"):
        assert certificate.rounding_bound("float32") == 0.5
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert certificate.rounding_bound("float32") == 0.5
    with jax.default_matmul_precision("highest"):
        assert certificate.rounding_bound("float32") == 1e-3


def test_one_prompt_is_too_few():
    with pytest.raises(UserError, match="at least two prompts"):
        ways(DECODERS["ar"], rows=ROWS[:1])


def test_rows_of_an_encoder_decoder_are_padded_apart():
    rows = [tiny.pack_apart([[example]], len(example[0]), 4) for example in tiny.random_examples(0, [(2, 4), (5, 4)])]
    batch = certificate.stack(rows, 3)
    assert batch.encoder_tokens.shape == (2, 8) and batch.tokens.shape == (2, 7)
    assert batch.encoder_segment_ids.sum(axis=1).tolist() == [2, 5] and batch.target_mask.sum() == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_of_tokens_holds_every_id(dtype):
    """Also where a number type has no such numbers, and beside what the cache held before."""
    config = dataclasses.replace(tiny.RELATIVE, dtype=dtype)
    tokens = jnp.array([[0, 255, 256, 65_535, 65_536, 262_143, 1_000_003, 3, 1, 2]])
    cache = KVCache.empty(config, Slots.of(ROWS[0]))
    cache = model_views._hold(cache.replace(keys=cache.keys + 7), tokens)
    assert model_views._held(cache).tolist() == tokens.tolist()
