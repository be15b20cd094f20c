"""Likelihood of a data set's targets: per example, and in bits per token and per byte."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.metrics import bootstrap_interval
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.objective import Likelihood, Objective

LikelihoodStep = Callable[[Params, Batch], Likelihood]


def make_likelihood_step(
    mesh: Mesh, definition: ModelDefinition, objective: Objective, *, num_draws: int, seed: int
) -> LikelihoodStep:
    """Returns the jitted `(params, batch, seed=seed) -> Likelihood`; examples draw from `(seed, example_ids)`.

    A seed that is given to the program, as a `streams.seed_number`, needs no other program.
    """

    def step(params: Params, batch: Batch, seed: jax.Array | np.uint32 | int = seed) -> Likelihood:
        return objective.log_likelihood(definition.bind(params), batch, jax.random.key(seed), num_draws)

    return jax.jit(step, out_shardings=partitioning.replicated(mesh))


def likelihoods(
    step: LikelihoodStep,
    params: Params,
    batches: Iterable[tuple[Batch, Sequence[Mapping[str, Any]]]],
    mesh: Mesh,
    to_text: Callable[[Sequence[int]], str],
) -> Iterator[dict[str, Any]]:
    """Yields one record for each example, in order.

    Args:
      step: see `make_likelihood_step`.
      params: the model's parameters.
      batches: batches of one example per row, and the examples (with their texts) in their first rows.
      mesh: the mesh for the rows.
      to_text: returns the text of target tokens, up to EOS.

    Yields:
      The example's own fields with "log_likelihood" (nats) and its "standard_error", "num_tokens" (in the targets,
      including the one that ends them) and "num_bytes" (of the targets' text as far as it was read, in UTF-8).

    Raises:
      UserError: rows are packed; a packed row has no likelihood per example.
    """
    for batch, examples in batches:
        if np.max(batch.segment_ids) > 1:
            raise UserError("Likelihoods need rows of one example each, but these are packed.")
        with jax.set_mesh(mesh):
            found = jax.device_get(step(params, partitioning.put_batch(mesh, batch)))
        for row, example in enumerate(examples):
            targets = batch.tokens[row][batch.target_mask[row]].tolist()
            yield {
                **example,
                "log_likelihood": float(found.log_likelihood[row]),
                "standard_error": float(found.standard_error[row]),
                "num_tokens": int(found.num_tokens[row]),
                "num_bytes": len(to_text(targets).encode("utf-8")),
            }


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Aggregates records of `likelihoods` into metrics.

    The metrics are "bits_per_token" and "bits_per_byte" (summed bits over summed tokens and bytes), and
    "log_likelihood" (nats, the mean over examples). Each has a standard error "_se", from only the objective's draws,
    which more draws make smaller; and a 95 % interval, "_low" to "_high", by a bootstrap over examples as for decoded
    texts, which covers the randomness of both draws and examples. There are also "num_texts", "num_tokens" and
    "num_bytes".

    Raises:
      UserError: no examples.
    """
    if not records:
        raise UserError("The evaluation set is empty: there is no likelihood to measure.")
    columns = ("log_likelihood", "num_tokens", "num_bytes")
    counts = np.array([[*(record[name] for name in columns), 1] for record in records], np.float64)
    totals = counts.sum(axis=0)
    error = math.sqrt(sum(record["standard_error"] ** 2 for record in records))
    metrics: dict[str, float] = {}
    for name, unit, by in (
        ("bits_per_token", -1 / math.log(2), 1),
        ("bits_per_byte", -1 / math.log(2), 2),
        ("log_likelihood", 1, 3),
    ):

        def mean(sums: np.ndarray, unit: float = unit, by: int = by) -> float:
            return float(unit * sums[0] / max(sums[by], 1))

        low, high = bootstrap_interval(counts, mean)
        standard_error = abs(unit) * error / max(totals[by], 1)
        metrics |= {name: mean(totals), f"{name}_se": standard_error, f"{name}_low": low, f"{name}_high": high}
    _, num_tokens, num_bytes, num_texts = totals.astype(int).tolist()
    return metrics | {"num_texts": num_texts, "num_tokens": num_tokens, "num_bytes": num_bytes}
