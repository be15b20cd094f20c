"""Bias and variance of the policy gradient's surrogates, on a model small enough to enumerate all it can write.

python launch/surrogates.py   (docs/rl.md says what the figures mean; a minute on one core)
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.policy_gradient import PolicyGradient

INPUTS, SIZE, WORDS = (5, 5, 3), 4, (2, 3, 4)
VOCABULARY = TokenIds(size=7, pad_id=0, eos_id=1, mask_id=6, start_id=0, noise_ranges=((2, 5),), noise_only=True)
CONFIG = ModelConfig(
    embed_dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=16, vocab_size=8, tie_embeddings=False
)
ROWS = [
    ("`trajectory`, all states", PolicyGradient(SIZE, draws=SIZE)),
    ("`trajectory`, 2 states", PolicyGradient(SIZE, draws=2)),
    ("`trajectory`, 1 state", PolicyGradient(SIZE, draws=1)),
    ("`one_step`", PolicyGradient(SIZE, "one_step", draws=1)),
    ("`coupled`, both masks", PolicyGradient(SIZE, "coupled", draws=2)),
    ("`coupled`, 1 of them", PolicyGradient(SIZE, "coupled", draws=1)),
]


@dataclasses.dataclass(frozen=True)
class Quality:
    """A surrogate's gradient on one text, against the gradient of the expected reward; all over the norm of the latter.

    Attributes:
      bias: distance of the mean over texts and draws.
      cosine: of the mean's angle, not divided by anything.
      deviation: standard deviation over texts and draws: the root of the summed variances of its coordinates.
    """

    bias: float
    cosine: float
    deviation: float


def ways() -> Batch:
    """Returns a row for each text of one block and each order of its tokens, written one a step."""
    written = list(itertools.product(itertools.product(WORDS, repeat=SIZE), itertools.permutations(range(SIZE))))
    shape = (len(written), len(INPUTS) + SIZE)
    is_target = np.broadcast_to(np.arange(shape[1]) >= len(INPUTS), shape)
    at = np.full(shape, -1, np.int32)
    at[:, len(INPUTS) :] = [order for _, order in written]
    return Batch(
        tokens=np.array([[*INPUTS, *text] for text, _ in written], np.int32),
        target_mask=is_target,
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        example_ids=np.arange(len(written), dtype=np.int32),
        written_at=at,
        written_log_probability=np.zeros(shape, np.float32),
        advantage=np.zeros(len(written), np.float32),
    )


def gradients(definition: ModelDefinition, objective: PolicyGradient, params: Any, texts: Batch, key: jax.Array) -> Any:
    """Returns each row's estimate of the expected reward's gradient, `[rows, parameters]`, for one draw of states."""
    prepared = objective.prepare_rollout(definition.bind(params), texts, key)

    def loss(params: Any, row: Batch) -> jax.Array:
        row = jax.tree.map(lambda x: x[None], row)
        return -objective.loss(definition.bind(params), row, key).loss.numerator / objective.draws

    rows = jax.vmap(jax.grad(loss), (None, 0))(params, prepared)
    return jnp.concatenate([x.reshape(len(texts.tokens), -1) for x in jax.tree.leaves(rows)], axis=1)


def measure(seed: int, num_draws: int) -> Iterator[Quality]:
    """Yields the quality of each of `ROWS`, for a random model and a random reward of texts.

    Args:
      seed: of model, rewards and draws.
      num_draws: number of draws of states, each of which is taken for every text.
    """
    definition, rng, texts = ModelDefinition(CONFIG, VOCABULARY), np.random.default_rng(seed), ways()
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), definition.abstract())
    each = ROWS[0][1].log_probabilities(definition.bind(params), texts, SIZE)
    probability = np.exp(np.asarray(each, np.float64).sum(axis=1)) / math.factorial(SIZE)
    assert abs(probability.sum() - 1) < 1e-4
    reward = np.repeat(rng.standard_normal(len(WORDS) ** SIZE), math.factorial(SIZE))
    reward -= probability @ reward
    texts = texts.replace(written_log_probability=each, advantage=reward.astype(np.float32))
    exact = None
    for _, objective in ROWS:
        run = jax.jit(functools.partial(gradients, definition, objective))
        mean, square = np.zeros(1), 0.0
        for draw in range(num_draws):
            found = np.asarray(run(params, texts, jax.random.key(draw)), np.float64)
            mean = mean + probability @ found / num_draws
            square += probability @ (found**2).sum(axis=1) / num_draws
        exact = mean if exact is None else exact
        norm = np.linalg.norm(exact)
        yield Quality(
            bias=float(np.linalg.norm(mean - exact) / norm),
            cosine=float(mean @ exact / norm / np.linalg.norm(mean)),
            deviation=float(np.sqrt(square - mean @ mean) / norm),
        )


def table(num_models: int = 5, num_draws: int = 32) -> str:
    """Returns the figures as a table in Markdown, means over models."""
    found = [list(measure(seed, num_draws)) for seed in range(num_models)]
    lines = ["| surrogate | passes | bias | cosine | standard deviation |", "| --- | ---: | ---: | ---: | ---: |"]
    for (name, objective), qualities in zip(ROWS, zip(*found, strict=True), strict=True):
        bias, cosine, deviation = np.mean([dataclasses.astuple(quality) for quality in qualities], axis=0)
        lines.append(f"| {name} | {objective.draws} | {bias:.2f} | {cosine:.2f} | {deviation:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
