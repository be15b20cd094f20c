"""Likelihoods of a data set's examples, and what they come to in bits."""

import math

import numpy as np
import pytest
import tiny

from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.evaluator import Evaluator, LikelihoodEval, LossEval
from diffusion_t5x.evaluation.likelihood import likelihoods, summarize
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.partitioning import MeshConfig

MESH = MeshConfig().make()
EXAMPLES = tiny.random_examples(0, [(2, 3), (1, 4), (3, 2), (0, 1), (2, 2)])


class Dataset:
    """Five examples in batches of two; the last batch is filled up with an empty row."""

    name = "five"

    def eval_batches(self, num_examples=None):
        for start in range(0, len(EXAMPLES[:num_examples]), 2):
            some = EXAMPLES[start : start + 2]
            batch = tiny.one_a_row([*some, ([], [])][:2], length=6, first_id=start)
            yield batch, [{"example_id": start + n} for n in range(len(some))]

    def to_text(self, tokens):
        return "é" * len(tokens)  # two bytes a token


def test_bits_are_the_losses_over_the_logarithm_of_two():
    definition, params = tiny.make_model()
    dataset = Dataset()
    evaluator = Evaluator(
        MESH, definition, Autoregressive(), [LossEval(dataset)], [], likelihood_evals=[LikelihoodEval(dataset)]
    )
    ((name, metrics, records),) = evaluator.likelihoods(params)
    # No token of a tiny vocabulary is beyond writing but MASK, whose share of the probability the loss leaves out.
    nll = -sum(record["log_likelihood"] for record in records)
    loss = evaluator.losses(params)["five"]["nll"]
    assert name == "five" and 0.5 * loss < nll / 12 <= loss
    assert [record["num_bytes"] for record in records] == [2 * len(targets) for _, targets in EXAMPLES]
    assert [record["example_id"] for record in records] == list(range(5))
    assert (metrics["num_texts"], metrics["num_tokens"], metrics["num_bytes"]) == (5, 12, 24)
    assert metrics["bits_per_token"] == pytest.approx(nll / math.log(2) / 12, rel=1e-6)
    assert metrics["bits_per_byte"] == pytest.approx(metrics["bits_per_token"] / 2)
    assert metrics["log_likelihood"] == pytest.approx(-nll / 5, rel=1e-6)
    assert metrics["bits_per_token_se"] == 0  # nothing is drawn


def test_errors_add_up_as_those_of_independent_draws():
    rng = np.random.default_rng(0)
    records = [
        {"log_likelihood": value, "standard_error": 0.5, "num_tokens": 10, "num_bytes": 40}
        for value in rng.normal(-20, 3, 400)
    ]
    metrics = summarize(records)
    assert metrics["log_likelihood_se"] == pytest.approx(0.5 / 20)
    assert metrics["bits_per_token_se"] == pytest.approx(0.5 / 20 / 10 / math.log(2))
    # The interval over examples is that of a mean: 3 / sqrt(400) to both sides, 1.96 times.
    half = (metrics["log_likelihood_high"] - metrics["log_likelihood_low"]) / 2
    assert half == pytest.approx(1.96 * 3 / 20, rel=0.1)
    ends = metrics["bits_per_byte_low"], metrics["bits_per_byte"], metrics["bits_per_byte_high"]
    assert sorted(ends) == list(ends)


def test_mistakes():
    packed = tiny.pack([EXAMPLES[:2]], 12)
    with pytest.raises(UserError, match="packed"):
        list(likelihoods(None, None, [(packed, [{}])], MESH, str))
    with pytest.raises(UserError, match="empty"):
        summarize([])
    with pytest.raises(UserError, match="even number"):
        LikelihoodEval(Dataset(), num_draws=3)
    definition, _ = tiny.make_model()
    with pytest.raises(UserError, match="Two evaluations of the same kind"):
        Evaluator(MESH, definition, Autoregressive(), [], [], likelihood_evals=[LikelihoodEval(Dataset())] * 2)
