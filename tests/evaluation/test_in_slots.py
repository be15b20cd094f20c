"""Predictions of a data set in slots are those of whole batches, in their order."""

import jax
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.evaluation.in_slots import SlotDecoding
from diffusion_t5x.evaluation.inference import make_decode_step, predict
from diffusion_t5x.partitioning import MeshConfig

MESH = MeshConfig().make()
SIZES = [(2, 8), (3, 1), (5, 2), (1, 3), (4, 7), (2, 1), (6, 5), (1, 1), (3, 8), (2, 2), (0, 0), (0, 0)]
EXAMPLES = [{"example_id": number} for number in range(10)]  # two rows fill up the last batch


def batches(size=4):
    whole = tiny.one_a_row(tiny.random_examples(0, SIZES))
    for first in range(0, len(SIZES), size):
        yield tiny.rows_of(whole, range(first, first + size)), EXAMPLES[first : first + size]


def cells(tokens):
    return [str(token) for token in tokens]


def judge(batch):
    """Stands in for a teacher: the sum of each row's tokens."""
    return {"sum": jax.numpy.sum(batch.tokens, axis=-1)}


def test_slots_predict_what_whole_batches_do():
    definition, params = tiny.make_model(tiny.LLAMA)
    decoder = AutoregressiveDecoder(temperature=1.0)
    step, slots = make_decode_step(MESH, definition, decoder, seed=3), SlotDecoding(MESH, definition, decoder, 3)
    arguments = params, batches(), MESH, lambda tokens: " ".join(cells(tokens)), cells, judge, 2
    expected = list(predict(step, *arguments))
    refused = lambda *_: pytest.fail("a whole batch was decoded")  # noqa: E731
    for _ in range(2):  # and once more, with the same programs
        arguments = (params, batches(), *arguments[2:])
        found = list(predict(refused, *arguments, slots=slots))
        scores = [[record.pop("score") for record in records] for records in (found, [dict(r) for r in expected])]
        np.testing.assert_allclose(*scores, rtol=1e-4)
        assert found == [{name: value for name, value in record.items() if name != "score"} for record in expected]
    assert [record["example_id"] for record in found] == list(range(10))
    assert len({record["num_steps"] for record in found}) > 3
    assert any(len(set(record["predictions"])) == 2 for record in found)


@pytest.mark.parametrize("decoder", [AutoregressiveDecoder(), BeamSearchDecoder(2)], ids=["one batch", "beam search"])
def test_one_batch_and_what_cannot_run_in_slots_are_decoded_whole(decoder, monkeypatch):
    definition, params = tiny.make_model(tiny.LLAMA)
    monkeypatch.setattr(SlotDecoding, "decode", lambda *_: pytest.fail("decoded in slots"))
    step, slots = make_decode_step(MESH, definition, decoder, seed=0), SlotDecoding(MESH, definition, decoder, 0)
    size = 12 if isinstance(decoder, AutoregressiveDecoder) else 4
    found = list(predict(step, params, batches(size), MESH, str, cells, slots=slots))
    assert [record["example_id"] for record in found] == list(range(10))


@pytest.mark.parametrize("size", [4, 12], ids=["three batches", "one batch"])
def test_texts_stop_early_with_the_same_words(size):
    """A stop string for each example, from its own whole text; where nothing stops a text, all of it is there."""
    definition, params = tiny.make_model(tiny.LLAMA)
    decoder = AutoregressiveDecoder(temperature=1.0)
    step, slots = make_decode_step(MESH, definition, decoder, seed=3), SlotDecoding(MESH, definition, decoder, 3)
    whole = list(predict(step, params, batches(), MESH, lambda tokens: " ".join(cells(tokens)), cells))
    words = {record["example_id"]: record["prediction"].split(" ")[1::2][:1] for record in whole}
    asked = set()

    def is_enough(example, tokens):
        asked.add(example["example_id"])
        return set(words[example["example_id"]]) & set(cells(tokens)) != set()

    refused = lambda *_: pytest.fail("a whole batch was decoded")  # noqa: E731
    found = list(
        predict(
            refused, params, batches(size), MESH, lambda tokens: " ".join(cells(tokens)), cells, slots=slots,
            is_enough=is_enough,
        )
    )  # fmt: skip
    shorter = 0
    for record, expected in zip(found, whole, strict=True):
        (stop,) = words[record["example_id"]] or [None]
        texts = [text.split(" ") for text in (record["prediction"], expected["prediction"])]
        here, there = (text[: text.index(stop)] if stop in text else text for text in texts)
        assert here == there and record["num_steps"] <= expected["num_steps"]
        shorter += record["num_steps"] < expected["num_steps"]
    assert shorter >= 3 and asked == {record["example_id"] for record in whole if record["num_steps"] > 4}
