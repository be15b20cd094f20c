"""Losses over an evaluation set, predictions of its examples, and both through the evaluator."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.decoder import Decoded, Trace
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.evaluator import (
    DecodeEval,
    Evaluator,
    LikelihoodEval,
    LossEval,
    check_decoders,
    for_tasks,
    prepared,
)
from diffusion_t5x.evaluation.inference import predict, write_jsonl
from diffusion_t5x.evaluation.losses import evaluate_loss
from diffusion_t5x.models.output import Ratio
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.objective import LossSums
from diffusion_t5x.partitioning import MeshConfig

MESH = MeshConfig().make()
EXAMPLES = tiny.random_examples(0, [(2, 3), (1, 4), (3, 2), (0, 1), (2, 2)])


class Dataset:
    """Five examples in batches of two; the last batch is filled up with an empty row."""

    name = "five"
    architecture, batch_size, task_feature_lengths = "decoder_only", 2, {"inputs": 3, "targets": 3}
    row_length = 6

    def eval_batches(self, num_examples=None):
        examples = EXAMPLES[:num_examples]
        for start in range(0, len(examples), 2):
            some = examples[start : start + 2]
            batch = tiny.one_a_row([*some, ([], [])][:2], length=6, first_id=start)
            yield batch, [{"example_id": start + n, "targets": self.to_text(t)} for n, (_, t) in enumerate(some)]

    def to_text(self, tokens):
        return " ".join(map(str, tokens))

    def cells(self, tokens):
        return [f"<{token}>" for token in tokens]

    def check_scoring(self):
        pass

    def score(self, records):
        return {"right": np.mean([record["prediction"] == record["targets"] for record in records])}


def batches():
    return (batch for batch, _ in Dataset().eval_batches())


def count_tokens(params, batch):
    """Stands in for a loss step: the mean token of the targets."""
    total, mask = functools.partial(jnp.sum, dtype=jnp.float32), batch.target_mask
    sums = Ratio(total(batch.tokens * mask), total(mask))
    return LossSums(sums, {"sequences": Ratio(total(mask), total(mask.any(axis=1)))})


def test_loss_is_the_sum_over_all_batches_divided_once():
    found = evaluate_loss(count_tokens, None, batches(), MESH)
    tokens = [token for _, targets in EXAMPLES for token in targets]
    assert found == {"loss": pytest.approx(np.mean(tokens)), "sequences": pytest.approx(len(tokens) / 5)}
    first = [token for _, targets in EXAMPLES[:2] for token in targets]
    assert evaluate_loss(count_tokens, None, batches(), MESH, num_batches=1)["loss"] == pytest.approx(np.mean(first))


def test_an_empty_evaluation_set_is_refused():
    with pytest.raises(UserError, match="empty"):
        evaluate_loss(count_tokens, None, iter(()), MESH)


def double(params, batch, sample):
    """Stands in for a decode step: writes every target twice as large, and by the sample's number larger."""
    tokens = jnp.where(batch.target_mask, 2 * batch.tokens + sample, batch.tokens)
    return Decoded.of(
        tokens,
        batch,
        tiny.VOCABULARY,
        scores=batch.example_ids / 10,
        steps=jnp.int32(1),
        row_steps=jnp.ones(len(tokens), int),
        written_at=jnp.where(batch.target_mask, 0, -1),
        trace=Trace(jnp.stack([batch.tokens, tokens]), jnp.zeros((2, *tokens.shape)).at[1].set(0.25)),
    )


def test_each_example_gets_its_prediction_in_order():
    dataset = Dataset()
    records = list(predict(double, None, dataset.eval_batches(), MESH, dataset.to_text, dataset.cells))
    assert len(records) == 5  # and none for the row that fills up the last batch
    for number, (record, (_, targets)) in enumerate(zip(records, EXAMPLES, strict=True)):
        text = " ".join(str(2 * token) for token in targets)
        assert record == {
            "example_id": number,
            "targets": dataset.to_text(targets),
            "prediction": text,
            "score": pytest.approx(number / 10),
            "num_tokens": len(targets),
            "num_steps": 1,
            "trace": {
                "tokens": [f"<{token}>" for token in targets],
                "given": [],
                "steps": [[[place, f"<{2 * token}>", 0.25] for place, token in enumerate(targets)]],
            },
        }


def test_with_several_samples_the_first_is_the_prediction_and_all_are_kept():
    dataset = Dataset()
    texts = dataset.to_text, dataset.cells
    records = list(predict(double, None, dataset.eval_batches(3), MESH, *texts, samples_per_example=3))
    assert [record["predictions"] for record in records] == [
        [" ".join(str(2 * token + sample) for token in targets) for sample in range(3)] for _, targets in EXAMPLES[:3]
    ]
    assert all(record["prediction"] == record["predictions"][0] for record in records)


class Dice:
    """A decoder that writes a number of 20 bits drawn from each row's key."""

    def decode(self, model, batch, key, trace=False):
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 100, 2**20))(row_keys(key, batch.example_ids))
        return Decoded.of(
            jnp.where(batch.target_mask, drawn[:, None], batch.tokens),
            batch,
            model.vocabulary,
            scores=jnp.zeros(len(drawn)),
            steps=jnp.int32(1),
            row_steps=jnp.ones(len(drawn), int),
            written_at=jnp.where(batch.target_mask, 0, -1),
            trace=None,
        )


def test_every_sample_of_every_example_has_numbers_of_its_own():
    definition, params = tiny.make_model()
    dataset = Dataset()

    def decode(samples_per_example):
        evals = [DecodeEval(dataset, Dice(), samples_per_example=samples_per_example)]
        ((_, _, records),) = Evaluator(MESH, definition, Autoregressive(), [], evals).decode(params)
        return records

    single, four, eight = decode(1), decode(4), decode(8)
    assert "predictions" not in single[0]
    for one, some, more in zip(single, four, eight, strict=True):
        # The first is what is written alone; more samples change none of the others.
        assert one["prediction"] == some["prediction"] and some["predictions"] == more["predictions"][:4]
    drawn = [text.split()[0] for record in eight for text in record["predictions"]]
    assert len(set(drawn)) == len(drawn) == 40  # two of 40 draws from 2^20 are equal once in 1,300 seeds


def test_fewer_than_one_sample_and_a_task_for_a_list_of_tasks_are_refused():
    with pytest.raises(UserError, match="samples_per_example must be at least 1"):
        DecodeEval(Dataset(), Dice(), samples_per_example=0)
    for tasks in ("pairs", []):
        with pytest.raises(UserError, match="EVAL_TASKS must be a list"):
            for_tasks(tasks, Dataset, DecodeEval)


def test_a_file_of_predictions_is_whole_or_not_there(tmp_path):
    path = tmp_path / "folder" / "predictions.jsonl"
    write_jsonl(str(path), [{"prediction": "é"}, {"prediction": "b"}])
    assert path.read_text(encoding="utf-8").splitlines() == ['{"prediction": "é"}', '{"prediction": "b"}']

    def breaks_off():
        yield {"prediction": "c"}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(str(path), breaks_off())
    assert [json.loads(line)["prediction"] for line in path.open(encoding="utf-8")] == ["é", "b"]


class Echo:
    """A decoder that writes the clean targets; it sees what it is bound to and what it draws from."""

    def decode(self, model, batch, key, trace=False):
        assert model.config == tiny.RELATIVE
        rows = len(batch.tokens)
        return Decoded.of(
            batch.tokens,
            batch,
            model.vocabulary,
            scores=jnp.zeros(rows),
            steps=jnp.int32(0),
            row_steps=jnp.full(rows, 2),
            written_at=jnp.where(batch.target_mask, 0, -1),
            trace=None,
        )


def test_the_evaluator_measures_losses_and_decodes():
    definition, params = tiny.make_model()
    dataset = Dataset()
    evaluator = Evaluator(
        MESH, definition, Autoregressive(), [LossEval(dataset)], [DecodeEval(dataset, Echo(), num_examples=3)]
    )
    losses = evaluator.losses(params)
    whole = tiny.one_a_row(EXAMPLES)
    expected = Autoregressive().loss(definition.bind(params), whole, None, train=False)
    assert losses["five"]["loss"] == pytest.approx(float(expected.loss.mean()), rel=1e-5)
    assert losses["five"]["accuracy"] == pytest.approx(float(expected.metrics["accuracy"].mean()))

    [(name, metrics, records)] = evaluator.decode(params)
    assert name == "five" and metrics["right"] == 1 and metrics["decode_seconds"] > 0
    assert [record["example_id"] for record in records] == [0, 1, 2] and "trace" not in records[0]


class Speculates(Dice):
    """Says of each row that of three drafted tokens one stayed."""

    def decode(self, model, batch, key, trace=False):
        ones = jnp.ones(len(batch.tokens), int)
        return super().decode(model, batch, key, trace).replace(num_drafted=3 * ones, num_accepted=ones)


def test_what_was_drafted_and_accepted_is_told():
    definition, params = tiny.make_model()
    dataset = Dataset()
    evaluator = Evaluator(MESH, definition, Autoregressive(), [], [DecodeEval(dataset, Speculates())])
    ((_, metrics, records),) = evaluator.decode(params)
    assert [(record["num_drafted"], record["num_accepted"]) for record in records] == [(3, 1)] * 5
    assert metrics["acceptance"] == pytest.approx(1 / 3)
    assert metrics["tokens_per_step"] == sum(len(targets) for _, targets in EXAMPLES) / 5
    assert "num_drafted" not in metrics and "num_accepted" not in metrics


@pytest.mark.parametrize("make", [LossEval, functools.partial(DecodeEval, decoder=Echo()), LikelihoodEval])
def test_an_evaluation_of_no_examples_is_none_and_one_of_fewer_is_refused(make):
    number = "num_batches" if make is LossEval else "num_examples"
    kept, skipped = make(Dataset()), make(Dataset(), **{number: 0})
    assert prepared([skipped, kept, skipped]) == [kept]
    with pytest.raises(UserError, match=rf"{number} must be at least 0, or None for all; got -1"):
        make(Dataset(), **{number: -1})


def test_what_was_decoded_is_kept_before_it_is_scored():
    class Fails(Dataset):
        def score(self, records):
            raise UserError("a target has no answer")

    definition, params = tiny.make_model()
    evaluator = Evaluator(MESH, definition, Autoregressive(), [], [DecodeEval(Fails(), Echo())])
    kept = {}
    with pytest.raises(UserError, match="has no answer"):
        list(evaluator.decode(params, kept.__setitem__))
    assert len(kept["five"]) == 5 and "prediction" in kept["five"][0]


class EightTokens(Echo):
    """A decoder that writes eight tokens, whatever the row's length."""

    def decode(self, model, batch, key, trace=False):
        return super().decode(model, batch.replace(tokens=batch.tokens[:, :8] + jnp.zeros(8, int)), key, trace)


def test_a_decoder_that_cannot_run_is_found_before_anything_is_compiled():
    definition, params = tiny.make_model()
    shapes = jax.eval_shape(lambda: params)
    check_decoders(MESH, definition, [DecodeEval(Dataset(), Echo())], shapes)
    with pytest.raises(ValueError, match="shapes"):
        check_decoders(MESH, definition, [DecodeEval(Dataset(), EightTokens())], shapes)
