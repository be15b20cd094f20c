"""A language whose truth is known: texts of a second-order Markov chain, and their exact cost under it."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Float64, Int

NUM_SYMBOLS = 12
_CONCENTRATION = 0.1  # of the Dirichlet draws: few likely successors for most pairs
_FLOOR = 0.02  # share of the uniform distribution in each row: no successor is impossible


@dataclasses.dataclass(frozen=True)
class Chain:
    """A stationary chain in which each symbol depends on the two before it.

    Attributes:
      next_symbol: `[first, second, next]`, the probability of a symbol after two others; all above 0.
    """

    next_symbol: Float64[np.ndarray, "symbols symbols symbols"]

    @classmethod
    def draw(cls, seed: int = 0, num_symbols: int = NUM_SYMBOLS) -> "Chain":
        """Draws the table: rows of a Dirichlet distribution, mixed with a little of the uniform one."""
        rows = np.random.default_rng(seed).dirichlet([_CONCENTRATION] * num_symbols, (num_symbols, num_symbols))
        return cls((1 - _FLOOR) * rows + _FLOOR / num_symbols)

    @functools.cached_property
    def pairs(self) -> Float64[np.ndarray, "symbols symbols"]:
        """The stationary probability of each pair of neighbours."""
        size = len(self.next_symbol)
        # The flow into each pair equals its own probability, and all sum to 1.
        step = np.einsum("ijk,jl->ijlk", self.next_symbol, np.eye(size)).reshape(size**2, size**2)
        equations = np.concatenate([step.T - np.eye(size**2), np.ones((1, size**2))])
        found, *_ = np.linalg.lstsq(equations, np.append(np.zeros(size**2), 1.0), rcond=None)
        return found.reshape(size, size)

    @property
    def entropy_rate(self) -> float:
        """Nats per symbol of the chain's own texts in the long run: the least that any model can reach on them."""
        return float(-np.einsum("ij,ijk,ijk", self.pairs, self.next_symbol, np.log(self.next_symbol)))

    def sample(self, num_texts: int, length: int, seed: int) -> Int[np.ndarray, "texts length"]:
        """Draws texts of the stationary chain, of at least two symbols."""
        rng, size = np.random.default_rng(seed), len(self.next_symbol)
        first = rng.choice(size**2, num_texts, p=np.clip(self.pairs, 0, None).ravel() / self.pairs.sum())
        texts = np.empty((num_texts, length), np.int64)
        texts[:, 0], texts[:, 1] = np.divmod(first, size)
        cumulative = np.cumsum(self.next_symbol, axis=-1)[..., :-1]
        for place in range(2, length):
            draws = rng.random((num_texts, 1))
            texts[:, place] = np.sum(draws >= cumulative[texts[:, place - 2], texts[:, place - 1]], axis=-1)
        return texts

    def nats(self, texts: Int[np.ndarray, "texts length"], given: int) -> Float[np.ndarray, " texts"]:
        """Returns each text's mean cost per symbol, in nats, after its first `given` symbols (at least two)."""
        chances = self.next_symbol[texts[:, given - 2 : -2], texts[:, given - 1 : -1], texts[:, given:]]
        return -np.log(chances).mean(axis=-1)
