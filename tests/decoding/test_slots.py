"""A text that is decoded in slots is the one that its row has alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from my_remasking import RemaskingDecoder
from plain_decoding import PlainDecoding, is_tie

from diffusion_t5x.decoding.ancestral import AncestralDecoder
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.credit import CreditDecoder
from diffusion_t5x.decoding.drafts import DraftingDecoder
from diffusion_t5x.decoding.editing import EditingDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.decoding.slots import Finished, Progress, SlotEngine
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.partitioning import MeshConfig

DECODERS = {
    "ar": AutoregressiveDecoder(),
    "ar, sampled": AutoregressiveDecoder(temperature=1.0, top_k=9),
    "ar, prefix": AutoregressiveDecoder(prefix=True),
    "block": BlockDecoder(3, MaskedDecoder(num_steps=2)),
    "block, sampled": BlockDecoder(3, MaskedDecoder(num_steps=None, threshold=0.4, temperature=1.0)),
    "block of rows": BlockDecoder(3, MaskedDecoder(num_steps=2, temperature=1.0), blocks_from="row"),
    "uniform block": BlockDecoder(4, SundaeDecoder(num_steps=2, num_samples=1, temperature=0.5)),
    "self-speculation": SelfSpeculationDecoder(BlockDecoder(3, MaskedDecoder(num_steps=1))),
    "drafts": DraftingDecoder(3, temperature=1.0),
    "masked": MaskedDecoder(num_steps=3, temperature=1.0),
    "masked by threshold": MaskedDecoder(num_steps=None, threshold=0.3, window=4),
    "masked, guided": MaskedDecoder(num_steps=3, guidance=0.5),
    "sundae": SundaeDecoder(num_steps=3, num_samples=2, temperature=0.5),
    "sundae, until unchanged": SundaeDecoder(9, 2, 0.0, update_share=0.5, stop_when_unchanged=True),
    "argmax unrolled": SundaeDecoder(4, 1, 0.0, "argmax_unrolled", 0.5),
    "ancestral": AncestralDecoder(num_steps=4),
    "editing": EditingDecoder(0.3, 0.1, extra_steps=3),
    "credit": CreditDecoder(0.3),
    "remasking": RemaskingDecoder(num_steps=6, cap=0.3),
}
CONFIGS = {
    "relative": tiny.RELATIVE,
    "rotary": tiny.LLAMA,
    "encoder-decoder": tiny.ENCODER_DECODER,
    "shifted": dataclasses.replace(tiny.LLAMA, shifted=True),
    "no start token": dataclasses.replace(tiny.LLAMA, shifted=True, reads_start=False),
    "shifted encoder-decoder": dataclasses.replace(tiny.ENCODER_DECODER, shifted=True),
}
CASES = [("rotary", name) for name in DECODERS]
CASES += [("relative", "ar"), ("relative", "block, sampled"), ("shifted", "masked")]
CASES += [("shifted", name) for name in ("block, sampled", "self-speculation")]
CASES += [("no start token", name) for name in ("ar", "block")]
CASES += [("encoder-decoder", name) for name in ("ar, sampled", "block", "masked, guided", "sundae")] + [
    ("shifted encoder-decoder", "block")
]
# Numbers of inputs and targets; one row has nothing to write.
SIZES = [(2, 7), (9, 5), (0, 8), (4, 7), (11, 2), (5, 0), (3, 7), (8, 8), (1, 1), (7, 6), (6, 3)]
INPUTS, TARGETS = 11, 8


@functools.cache
def make_rows(architecture):
    """Rows by their names, not as wide as each other."""
    rows = {}
    for number, size in enumerate(SIZES):
        (example,) = tiny.random_examples(number, [size])
        if architecture == "encoder_decoder":
            row = tiny.pack_apart([[example]], max(size[0], 1), max(size[1], 1), first_id=number)
        else:
            row = tiny.one_a_row([example], first_id=number)
        rows[f"row {number}"] = row
    return rows


def make_engine(config, decoder, **settings):
    definition, params = tiny.make_model(CONFIGS[config])
    has_encoder = definition.config.architecture == "encoder_decoder"
    settings = {"num_slots": 3, "length": TARGETS if has_encoder else INPUTS + TARGETS, "piece": 4, **settings}
    return SlotEngine(
        MeshConfig().make(), definition, params, decoder, encoder_length=INPUTS if has_encoder else None, **settings
    )


def padded(row, length, encoder_length=INPUTS):
    def pad(name, x):
        width = encoder_length if name.startswith("encoder") else length
        return np.pad(x, ((0, 0), (0, width - x.shape[1]))) if x.ndim == 2 else x

    return row.replace(**{name: pad(name, x) for name, x in vars(row).items() if x is not None})


@functools.cache
def alone(config, name, seed):
    """The output of each row, decoded by itself."""
    definition, params = tiny.make_model(CONFIGS[config])
    decoder, architecture = DECODERS[name], definition.config.architecture
    decode = jax.jit(lambda batch: decoder.decode(definition.bind(params), batch, jax.random.key(seed)))
    length = TARGETS if architecture == "encoder_decoder" else INPUTS + TARGETS
    rows = make_rows(architecture).items()
    return {ident: (row, jax.device_get(decode(padded(row, length)))) for ident, row in rows}


def check(config, name, found, seed=0):
    """Returns the number of texts that differ by a tie."""
    ties, expected = 0, alone(config, name, seed)
    for ident, decoded in found.items():
        row, whole = expected[ident]
        width = row.tokens.shape[1]
        assert decoded.tokens.shape == (1, width)
        if (decoded.tokens == whole.tokens[:, :width]).all():
            for field in ("canvas", "written_at"):
                np.testing.assert_array_equal(getattr(decoded, field), getattr(whole, field)[:, :width], field)
            for field in ("row_steps", "num_tokens", "steps", "num_drafted", "num_accepted"):
                np.testing.assert_array_equal(getattr(decoded, field), getattr(whole, field), field)
            np.testing.assert_allclose(decoded.scores, whole.scores, rtol=1e-4, atol=1e-5)
        else:
            definition, params = tiny.make_model(CONFIGS[config])
            ties += is_tie(decoded.tokens[0], PlainDecoding(definition, params, DECODERS[name], row, seed))
    return ties


def numbered(rows):
    """Names, rows and numbers of samples."""
    return ((ident, row, 0) for ident, row in rows)


# Every case is three programs or more to compile.
QUICK = [("rotary", name) for name in ("ar, sampled", "block, sampled")]


@pytest.mark.parametrize(
    ("config", "name"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_every_text_is_that_of_its_row_alone(config, name):
    engine = make_engine(config, DECODERS[name])
    rows = list(make_rows(CONFIGS[config].architecture).items())
    ties = 0
    for order in (rows, rows[::-1]):
        found = dict(engine.decode(numbered(order)))
        assert found.keys() == dict(rows).keys()
        ties += check(config, name, found)
    assert ties <= 1
    assert len(np.unique(np.concatenate([decoded.tokens[0] for decoded in found.values()]))) > 8


def run(engine):
    """All events by name, in the order in which they came."""
    events = {}
    while engine.num_running + engine.num_waiting:
        for event in engine.advance():
            events.setdefault(event.ident, []).append(event)
    return events


@pytest.mark.slow
def test_progress_leads_to_the_text():
    engine, rows = make_engine("rotary", DECODERS["block"], stride=1), make_rows("decoder_only")
    for ident, row in rows.items():
        engine.submit(ident, row)
    events = run(engine)
    assert events.keys() == rows.keys()
    for *shown, last in events.values():
        assert isinstance(last, Finished) and all(isinstance(event, Progress) for event in shown)
        numbers = [event.num_written for event in shown]
        assert numbers == sorted(set(numbers)) and all(number % 3 == 0 for number in numbers)
        for event in shown:
            written = (last.decoded.written_at[0] >= 0).nonzero()[0][: event.num_written]
            np.testing.assert_array_equal(event.tokens[written], last.decoded.canvas[0, written])
    assert max(map(len, events.values())) == 3
    assert check("rotary", "block", {ident: last.decoded for ident, (*_, last) in events.items()}) <= 1


def test_cancelled_rows_leave_and_no_other_notices():
    engine, rows = make_engine("rotary", DECODERS["ar, sampled"]), make_rows("decoder_only")
    for ident, row in rows.items():
        engine.submit(ident, row)
    engine.advance()
    running = [request.ident for request in engine._slots]
    assert running == ["row 0", "row 1", "row 2"] and engine.num_waiting == 8
    engine.cancel("row 1")
    engine.cancel("row 8")
    engine.cancel("no such row")
    assert (engine.num_running, engine.num_waiting) == (2, 7)
    found = {ident: last.decoded for ident, (*_, last) in run(engine).items()}
    assert found.keys() == rows.keys() - {"row 1", "row 8"}
    assert check("rotary", "ar, sampled", found) <= 1
    assert engine.advance() == []
    engine.submit("row 1", rows["row 1"])  # once more
    assert check("rotary", "ar, sampled", {"row 1": run(engine)["row 1"][-1].decoded}) == 0


@pytest.mark.parametrize("name", ["ar, sampled", pytest.param("block", marks=pytest.mark.slow)])
def test_rows_leave_when_no_more_is_needed(name):
    """Rows of even numbers after two tokens; the others, and those that had so many in their last piece, are whole."""
    engine, rows, seen = make_engine("rotary", DECODERS[name], stride=1), make_rows("decoder_only"), {}

    def is_enough(ident, tokens):
        seen.setdefault(ident, []).append(tokens)
        return len(tokens) >= 2 and int(ident.removeprefix("row ")) % 2 == 0

    found = dict(engine.decode(numbered(rows.items()), is_enough))
    expected, early = alone("rotary", name, 0), {}
    for ident, decoded in found.items():
        row, whole = expected[ident]
        width = row.tokens.shape[1]
        written = decoded.written_at >= 0
        if (written == (whole.written_at[:, :width] >= 0)).all():
            continue
        early[ident] = written.sum()
        assert (decoded.canvas[written] == whole.canvas[:, :width][written]).all()
        assert (decoded.tokens[row.target_mask & ~written] == tiny.VOCABULARY.pad_id).all()
        assert decoded.num_tokens == written.sum() and seen[ident][-1] == decoded.canvas[written].tolist()
        assert decoded.row_steps < whole.row_steps
    enough = 2 if name == "ar, sampled" else 3  # a block
    lengths = {ident: (whole.written_at >= 0).sum() for ident, (_, whole) in expected.items()}
    longer = [ident for ident, length in lengths.items() if int(ident[4:]) % 2 == 0 and length > enough]
    assert early == dict.fromkeys(longer, enough) and len(longer) > 1
    assert check("rotary", name, {ident: x for ident, x in found.items() if ident not in early}) == 0


def test_a_canvas_is_written_whole_whatever_is_needed():
    engine = make_engine("rotary", DECODERS["masked"])
    refused = lambda *_: pytest.fail("asked")  # noqa: E731
    found = dict(engine.decode(numbered(list(make_rows("decoder_only").items())[:3]), refused))
    assert check("rotary", "masked", found) == 0


@pytest.mark.slow
def test_longer_strides_and_other_pieces_write_the_same():
    for settings in ({"stride": 5, "piece": 1}, {"num_slots": 11, "piece": 100}, {"num_slots": 1}):
        engine = make_engine("rotary", DECODERS["ar, sampled"], **settings)
        found = dict(engine.decode(numbered(make_rows("decoder_only").items())))
        assert len(found) == len(SIZES) and check("rotary", "ar, sampled", found) <= 1


@pytest.mark.slow
def test_rows_have_seeds_and_samples_of_their_own():
    engine, row = make_engine("rotary", DECODERS["ar, sampled"]), make_rows("decoder_only")["row 2"]
    settings = [{}, {"seed": 7}, {"sample": 1}, {"sample": 2}, {"seed": 7, "sample": 1}]
    for number, setting in enumerate(settings):
        engine.submit(number, row, **setting)
    found = {number: events[-1].decoded for number, events in run(engine).items()}
    assert len({decoded.tokens.tobytes() for decoded in found.values()}) == len(settings)
    definition, params = tiny.make_model(CONFIGS["rotary"])
    mesh, decoder = MeshConfig().make(), DECODERS["ar, sampled"]
    steps = {seed: make_decode_step(mesh, definition, decoder, seed=seed) for seed in (0, 7)}
    for number, setting in enumerate(settings):
        step = steps[setting.get("seed", 0)]
        expected = step(params, padded(row, INPUTS + TARGETS), np.int32(setting.get("sample", 0)))
        np.testing.assert_array_equal(found[number].tokens, expected.tokens[:, : row.tokens.shape[1]])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="BeamSearchDecoder cannot decode in slots"):
        make_engine("rotary", BeamSearchDecoder())
    with pytest.raises(UserError, match="num_slots must be at least 1, not 0"):
        make_engine("rotary", AutoregressiveDecoder(), num_slots=0)
    engine, rows = make_engine("rotary", AutoregressiveDecoder(), length=10), make_rows("decoder_only")
    with pytest.raises(UserError, match="A row has 14 slots, but the engine's have 10"):
        engine.submit("row 1", rows["row 1"])
    engine.submit("row 0", rows["row 0"])
    with pytest.raises(UserError, match="'row 0' is already being decoded"):
        engine.submit("row 0", rows["row 0"])
