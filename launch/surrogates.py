"""Bias and variance of the policy gradient's surrogates, on a model small enough to enumerate all it can write.

python launch/surrogates.py   (docs/rl.md says what the figures mean; three minutes on one core)
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.policy_gradient import PolicyGradient
from diffusion_t5x.objectives.sandwiched import SandwichedPolicyGradient

INPUTS, SIZE, WORDS = (5, 5, 3), 3, (2, 3, 4)  # one block, of words without an end
MODEL = ModelDefinition(
    ModelConfig(embed_dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=16, vocab_size=8, tie_embeddings=False),
    TokenIds(size=7, pad_id=0, eos_id=1, mask_id=6, start_id=0, noise_ranges=((2, 5),), noise_only=True),
)
SURROGATES: dict[str, PolicyGradient | SandwichedPolicyGradient] = {
    "`trajectory`, all states": PolicyGradient(SIZE, draws=SIZE),
    "`trajectory`, 2 of 3 states": PolicyGradient(SIZE, draws=2),
    "`trajectory`, 1 of 3 states": PolicyGradient(SIZE, draws=1),
    "`one_step`": PolicyGradient(SIZE, "one_step", draws=1),
    "`coupled`, both masks": PolicyGradient(SIZE, "coupled", draws=2),
    "`coupled`, 1 of them": PolicyGradient(SIZE, "coupled", draws=1),
    **{
        f"bounds, `UPPER_WEIGHT={weight}`, {states}": SandwichedPolicyGradient(SIZE, draws=draws, upper_weight=weight)
        for weight in (0.0, 0.5, 1.0)
        for states, draws in (("all states", SIZE), ("1 of 3 states", 1))
    },
}


@dataclasses.dataclass(frozen=True)
class Quality:
    """A surrogate's gradient on one text, against the gradient of the expected reward.

    Attributes:
      bias: distance of the mean over texts and draws, over the norm of the expected reward's gradient.
      cosine: of the angle between these two.
      deviation: standard deviation over texts and draws, over that norm: the root of its coordinates' summed variances.
    """

    bias: float
    cosine: float
    deviation: float


def ways() -> Batch:
    """Returns a row for each text of one block and each order of its tokens, one of them a step."""
    written = list(itertools.product(itertools.product(WORDS, repeat=SIZE), itertools.permutations(range(SIZE))))
    shape = (len(written), len(INPUTS) + SIZE)
    at = np.full(shape, -1, np.int32)
    at[:, len(INPUTS) :] = [order for _, order in written]
    return Batch(
        tokens=np.array([[*INPUTS, *text] for text, _ in written], np.int32),
        target_mask=np.broadcast_to(np.arange(shape[1]) >= len(INPUTS), shape),
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        example_ids=np.arange(len(written), dtype=np.int32),
        written_at=at,
    )


@functools.cache
def program(objective: PolicyGradient | SandwichedPolicyGradient) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the jitted `(params, texts, probability, key) -> (mean, mean square)` of the gradients over texts."""

    def moments(params: Any, texts: Batch, probability: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(params: Any, row: Batch) -> jax.Array:
            row = jax.tree.map(lambda x: x[None], row)
            return -row.tokens.shape[1] * objective.loss(MODEL.bind(params), row, key).loss.mean()

        prepared = objective.prepare_rollout(MODEL.bind(params), texts, key)
        rows = jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0))(params, prepared))
        each = jnp.concatenate([x.reshape(len(texts.tokens), -1) for x in rows], axis=1)
        return probability @ each, probability @ jnp.sum(each**2, axis=1)

    return jax.jit(moments)


def measure(seed: int, num_draws: int) -> Iterator[Quality]:
    """Yields the quality of each of `SURROGATES`, for a random model and a random reward of each text.

    Args:
      seed: of the model and the rewards.
      num_draws: number of draws of states, each of which is taken for every text.
    """
    rng, texts = np.random.default_rng(seed), ways()
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), MODEL.abstract())
    all_states = PolicyGradient(SIZE, draws=SIZE)
    each = jax.jit(lambda params: all_states.log_probabilities(MODEL.bind(params), texts, SIZE))(params)
    probability = jnp.exp(jnp.sum(each, axis=1)) / math.factorial(SIZE)
    assert abs(probability.sum() - 1) < 1e-4
    reward = np.repeat(rng.standard_normal(len(WORDS) ** SIZE), math.factorial(SIZE)).astype(np.float32)
    texts = texts.replace(written_log_probability=each, advantage=reward - probability @ reward)

    def over_draws(objective: PolicyGradient | SandwichedPolicyGradient) -> tuple[np.ndarray, float]:
        keys = jax.random.split(jax.random.key(seed), num_draws)
        found = [program(objective)(params, texts, probability, key) for key in keys]
        return np.mean([mean for mean, _ in found], axis=0), float(np.mean([square for _, square in found]))

    exact, _ = over_draws(all_states)
    norm = float(np.linalg.norm(exact))
    for objective in SURROGATES.values():
        mean, square = over_draws(objective)
        yield Quality(
            bias=float(np.linalg.norm(mean - exact)) / norm,
            cosine=float(mean @ exact / norm / np.linalg.norm(mean)),
            deviation=math.sqrt(square - mean @ mean) / norm,
        )


def table(num_models: int = 5, num_draws: int = 200) -> str:
    """Returns the figures as a table in Markdown, means over models."""
    found = [list(measure(seed, num_draws)) for seed in range(num_models)]
    lines = ["| surrogate | passes | bias | cosine | standard deviation |", "| --- | ---: | ---: | ---: | ---: |"]
    for (name, objective), qualities in zip(SURROGATES.items(), zip(*found, strict=True), strict=True):
        bias, cosine, deviation = np.mean([dataclasses.astuple(quality) for quality in qualities], axis=0)
        lines.append(f"| {name} | {objective.draws} | {bias:.2f} | {cosine:.2f} | {deviation:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
