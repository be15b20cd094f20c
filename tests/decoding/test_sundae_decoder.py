"""SUNDAE decoding: its steps, scores and choice among samples worked out anew, and what its outputs may depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots

# Inputs of many lengths, none in row 2, and a filler row without anything.
SIZES = [(2, 7), (6, 7), (0, 7), (4, 7)]
BATCH = tiny.one_a_row([*tiny.random_examples(0, SIZES), ([], [])], first_id=40)


@functools.cache
def decoder(name, **settings):
    definition, _ = make_model(name)
    settings = SundaeDecoder(**settings)
    return jax.jit(lambda params, batch, key: settings.decode(definition.bind(params), batch, key, trace=True))


@functools.cache
def make_model(name):
    return tiny.make_model({"relative": tiny.RELATIVE, "rotary": tiny.LLAMA}[name])


def decode(name, batch=BATCH, seed=0, **settings):
    return jax.device_get(decoder(name, **settings)(make_model(name)[1], batch, jax.random.key(seed)))


@functools.cache
def log_probabilities(name):
    """Jitted, of a canvas: of every position; MASK and what is no id cannot come."""
    definition, params = make_model(name)

    @jax.jit
    def of(params, tokens):
        model = definition.bind(params)
        logits = model.logits(model(tokens, Slots.of(BATCH), BIDIRECTIONAL).hidden)
        return jax.nn.log_softmax(logits.at[..., 23:].set(-np.inf))

    return lambda tokens: np.asarray(of(params, tokens))


def ended(tokens):
    """The tokens of a canvas up to its first EOS or pad, and pad after it."""
    ends = [place for place, token in enumerate(tokens) if token in (0, 1)]
    return [token if not ends or place <= ends[0] else 0 for place, token in enumerate(tokens)]


@pytest.mark.parametrize("name", ["relative", "rotary"])
def test_greedy_steps_and_score_follow_from_whole_passes(name):
    decoded = decode(name, num_steps=4, num_samples=3, temperature=0.0)
    assert decoded.steps == 4 and decoded.trace.tokens.shape == (5, *BATCH.tokens.shape)
    targets = BATCH.target_mask
    for before, after in zip(decoded.trace.tokens, decoded.trace.tokens[1:], strict=False):
        found = log_probabilities(name)(before)
        np.testing.assert_array_equal(after, np.where(targets, found.argmax(-1), BATCH.tokens))
    # `found` is what the last step's reading gives: the score is that reading's own cross-entropy.
    wish = -np.take_along_axis(found, decoded.trace.tokens[-2][..., None], axis=-1)[..., 0]
    expected = [row[mask].mean() if mask.any() else 0 for row, mask in zip(wish, targets, strict=True)]
    np.testing.assert_allclose(decoded.scores, expected, rtol=1e-5)
    for row, mask, last in zip(decoded.tokens, targets, decoded.trace.tokens[-1], strict=True):
        assert row[mask].tolist() == ended(last[mask].tolist())
    assert (decoded.trace.tokens[1:] != decoded.trace.tokens[:-1]).any()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_confidences_are_the_probabilities_at_temperature_1(temperature):
    decoded = decode("rotary", num_steps=3, num_samples=2, temperature=temperature)
    assert not decoded.trace.confidence[0].any()
    canvases = decoded.trace.tokens
    for before, after, confidence in zip(canvases, canvases[1:], decoded.trace.confidence[1:], strict=False):
        found = np.take_along_axis(log_probabilities("rotary")(before), after[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(confidence, np.where(BATCH.target_mask, np.exp(found), 0), rtol=1e-4)


def test_inputs_never_change_and_noise_is_of_the_noise_vocabulary():
    decoded = decode("relative", num_steps=3, num_samples=2, temperature=0.7)
    targets = BATCH.target_mask
    for canvas in [*decoded.trace.tokens, decoded.tokens]:
        np.testing.assert_array_equal(canvas[~targets], BATCH.tokens[~targets])
    assert np.isin(decoded.trace.tokens[0][targets], tiny.VOCABULARY.noise_ids()).all()
    assert len(np.unique(decoded.trace.tokens[0][targets])) > 10
    assert (decoded.trace.tokens < 23).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 0.7, "update_share": 0.4},
        {"temperature": 0.0, "update_share": 0.4, "method": "argmax_unrolled", "stop_when_unchanged": True},
    ],
    ids=str,
)
def test_an_output_depends_on_its_own_inputs_alone(settings):
    settings = {"num_steps": 3, "num_samples": 2} | settings
    whole = decode("rotary", **settings)

    def assert_same(batch, rows):
        found = decode("rotary", batch, **settings)
        np.testing.assert_array_equal(found.trace.tokens[..., : BATCH.tokens.shape[1]], whole.trace.tokens[:, rows])
        np.testing.assert_array_equal(found.tokens[:, : BATCH.tokens.shape[1]], whole.tokens[rows])
        np.testing.assert_allclose(found.scores, whole.scores[rows], rtol=1e-5)

    garbage = np.random.default_rng(1).integers(0, 24, BATCH.tokens.shape)
    assert_same(BATCH.replace(tokens=np.where(BATCH.target_mask, garbage, BATCH.tokens)), [0, 1, 2, 3, 4])
    assert_same(tiny.rows_of(BATCH, [3, 4, 1, 0, 2]), [3, 4, 1, 0, 2])
    alone = tiny.rows_of(BATCH, [1])
    assert_same(jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 4))) if x.ndim == 2 else x, alone), [1])
    assert (decode("rotary", seed=1, **settings).tokens != whole.tokens).any()


@pytest.mark.parametrize("share,num_steps", [(0.1, 4), (0.4, 4), (0.4, 5), (1.0, 5)])
def test_argmax_unrolled_steps_follow_from_whole_passes(share, num_steps):
    """Every second step writes only what the one before was least sure of, from a reading of what that one wrote."""
    settings = {"temperature": 0.0, "method": "argmax_unrolled", "update_share": share}
    decoded = decode("rotary", num_steps=num_steps, num_samples=1, **settings)
    canvas, confidence = decoded.trace.tokens[0].copy(), np.zeros(BATCH.tokens.shape)
    written_at = np.full(canvas.shape, -1)
    for step in range(num_steps):
        found = log_probabilities("rotary")(canvas)
        read = canvas.copy()
        for row, mask in enumerate(BATCH.target_mask):
            places = np.flatnonzero(mask)
            if step % 2 == 1:
                surest_last = sorted(places, key=lambda place: confidence[row, place])
                places = surest_last[: max(round(share * len(places)), 1)]
            for place in places:
                canvas[row, place] = found[row, place].argmax()
                confidence[row, place] = np.exp(found[row, place].max())
                written_at[row, place] = step
        np.testing.assert_array_equal(decoded.trace.tokens[step + 1], canvas)
        np.testing.assert_allclose(decoded.trace.confidence[step + 1], confidence, rtol=1e-4)
    np.testing.assert_array_equal(decoded.written_at, written_at)
    wish = -np.take_along_axis(found, read[..., None], axis=-1)[..., 0]
    expected = [row[mask].mean() if mask.any() else 0 for row, mask in zip(wish, BATCH.target_mask, strict=True)]
    np.testing.assert_allclose(decoded.scores, expected, rtol=1e-5)


TABLE = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
TABLE[:, 23:] = 9.0  # MASK and what is no id would come first


def decode_table(batch, table=TABLE, **settings):
    decoder = SundaeDecoder(**settings)
    return jax.device_get(
        jax.jit(
            lambda batch: decoder.decode(tiny.TableModel(jnp.asarray(table)), batch, jax.random.key(0), trace=True)
        )(batch)
    )


def test_the_best_of_the_samples_is_kept():
    """Sample n is the same however many there are: one more either has a lower score and wins, or changes nothing."""
    batch = tiny.one_a_row(tiny.random_examples(0, [(2, 5)] * 30))
    before = decode_table(batch, num_steps=2, num_samples=1)
    after = decode_table(batch, num_steps=2, num_samples=3)
    assert (after.scores <= before.scores).all()
    better = after.scores < before.scores
    assert 10 <= better.sum() <= 28  # about two thirds of 30
    np.testing.assert_array_equal(after.trace.tokens[:, ~better], before.trace.tokens[:, ~better])
    assert (after.trace.tokens != before.trace.tokens).any(axis=(0, 2))[better].all()
    read = after.trace.tokens[-2]
    wish = np.log(np.exp(TABLE[read, :23]).sum(-1)) - TABLE[read, read]
    np.testing.assert_allclose(after.scores, wish[:, 2:].mean(axis=1), rtol=1e-5)


def test_canvases_start_uniform_and_are_sampled_at_the_temperature():
    rows, length = 400, 40
    batch = tiny.one_a_row([([], [5] * length)] * rows)
    trace = decode_table(batch, num_steps=2, num_samples=1, temperature=0.5).trace.tokens
    noise, count = tiny.VOCABULARY.noise_ids(), rows * length
    share = np.bincount(trace[0].reshape(-1), minlength=32)[noise] / count
    assert share.sum() == pytest.approx(1)
    assert np.abs(share - 1 / len(noise)).max() < 5 * np.sqrt(1 / len(noise) / count)

    weights = np.where(np.arange(32) < 23, np.exp(TABLE / 0.5), 0)
    expected = weights / weights.sum(axis=1, keepdims=True)
    for before, after in ((trace[0], trace[1]), (trace[1], trace[2])):
        for token in (4, 15):
            written = after[before == token]
            share = np.bincount(written, minlength=32) / len(written)
            assert (np.abs(share - expected[token]) <= 6 * np.sqrt(expected[token] / len(written))).all()


@pytest.mark.parametrize("share,count", [(0.05, 1), (0.3, 3), (0.7, 7)])
def test_each_step_writes_a_random_share(share, count):
    """The same number in each row, any position as often as another, independently of rows and of the other step."""
    rows, length = 1000, 10
    batch = tiny.one_a_row([([3], [5] * length)] * rows)
    twice = decode_table(batch, num_steps=2, num_samples=1, update_share=share)
    written = twice.trace.confidence[1, :, 1:] > 0
    assert (written.sum(axis=1) == count).all()
    share = count / length
    assert np.abs(written.mean(axis=0) - share).max() < 5 * np.sqrt(share * (1 - share) / rows)
    kept = twice.trace.tokens[1] == twice.trace.tokens[0]
    assert kept[:, 1:][~written].all() and not kept[:, 1:][written].all()
    once = (twice.trace.confidence[1:] != twice.trace.confidence[:-1])[..., 1:]
    assert (once[0] == written).all() and (twice.written_at[:, 1:][once[1]] == 1).all()
    found = [(twice.written_at[:, 1:] == step).mean() for step in (-1, 0, 1)]
    np.testing.assert_allclose(found, [(1 - share) ** 2, share * (1 - share), share], atol=0.03)


# Greedily a token moves three ids down, until it is one of 4, 5 and 6: there it stays.
DOWN = np.where(np.arange(32) < 7, np.clip(np.arange(32), 4, 6), np.arange(32) - 3)
CALM = TABLE + 12 * np.eye(32, dtype=np.float32)[DOWN]


def test_a_canvas_is_finished_when_a_step_changes_nothing():
    batch = tiny.one_a_row(tiny.random_examples(0, [(2, 3), (1, 1), (0, 5), (3, 2), (0, 0)]))
    settings = {"num_samples": 1, "temperature": 0.0}
    stopped = decode_table(batch, CALM, num_steps=9, stop_when_unchanged=True, **settings)
    row_steps = []
    for tokens, mask in zip(stopped.trace.tokens[0], batch.target_mask, strict=True):
        steps, canvas = min(mask.sum(), 1), tokens[mask]
        while (DOWN[canvas] != canvas).any():
            steps, canvas = steps + 1, DOWN[canvas]
        row_steps.append(steps)
    assert stopped.row_steps.tolist() == row_steps and stopped.steps == max(row_steps) < 9
    assert len(set(row_steps)) > 3
    for row, mask in enumerate(batch.target_mask):
        assert (stopped.written_at[row, mask] == row_steps[row] - 1).all()
    assert len(stopped.trace.tokens) == 10


@pytest.mark.parametrize(
    "settings", [{}, {"update_share": 0.5}, {"update_share": 0.5, "method": "argmax_unrolled"}], ids=str
)
def test_stopping_changes_no_greedy_result(settings):
    batch = tiny.one_a_row(tiny.random_examples(0, [(2, 3), (1, 1), (0, 5), (3, 2), (0, 0)]))
    settings |= {"num_samples": 3, "temperature": 0.0, "num_steps": 40}
    whole, stopped = (decode_table(batch, CALM, stop_when_unchanged=stop, **settings) for stop in (False, True))
    np.testing.assert_array_equal(stopped.trace.tokens, whole.trace.tokens)
    np.testing.assert_array_equal(stopped.tokens, whole.tokens)
    np.testing.assert_allclose(stopped.scores, whole.scores, rtol=1e-6)
    assert whole.steps == 40 and whole.row_steps.tolist() == [40] * 4 + [0]
    assert stopped.steps == stopped.row_steps.max() < 40 and stopped.row_steps[-1] == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"num_steps": 0},
        {"num_samples": 0},
        {"temperature": -0.1},
        {"update_share": 0.0},
        {"update_share": 1.1},
        {"method": "unrolled"},
        {"method": "argmax_unrolled"},  # at the default temperature
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError):
        SundaeDecoder(**bad)
