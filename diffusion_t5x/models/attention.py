"""Multi-head attention with grouped key/value heads, and its cache."""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Shaped

from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.dot_product import KEYS, QUERIES, attend
from diffusion_t5x.models.layers import RMSNorm, add_bias, dense, normal, param
from diffusion_t5x.models.masks import Sight, Slots
from diffusion_t5x.models.positions import rotate
from diffusion_t5x.models.slots import put_slots
from diffusion_t5x.partitioning import constrain
from diffusion_t5x.shapes import (
    AnyIntBL,
    Array,
    FloatBKHD,
    FloatBLD,
    FloatBQHD,
    FloatNBLHD,
    FloatNHQK,
    IntB,
    IntBQ,
    KeyScalar,
)


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the slots seen so far, stacked over layers, and the properties of all slots of the rows.

    A slot's keys are at the slot's own index, so the mask between any queries and the cache follows from `slots`.
    Queries must not see unwritten slots; attention that only looks back guarantees that, and so does a pass over whole
    rows, after which cached slots are as they were then ("stale").

    Attributes:
      keys, values: of every layer.
      slots: slots of the rows being decoded.
    """

    keys: FloatNBLHD
    values: FloatNBLHD
    slots: Slots

    @classmethod
    def empty(cls, config: ModelConfig, slots: Slots) -> Self:
        shape = (config.num_layers, *slots.positions.shape, config.kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.dtype)
        return cls(keys=zeros, values=zeros, slots=slots)

    def take(self, rows: IntB) -> Self:
        """Returns the cache of these rows; a row may occur several times."""
        slots = jax.tree.map(lambda field: field[rows], self.slots)
        return self.replace(keys=self.keys[:, rows], values=self.values[:, rows], slots=slots)


def write_rows(
    buffer: Shaped[jax.Array, "batch length *rest"], values: Shaped[jax.Array, "batch new *rest"], start: IntB
) -> Shaped[jax.Array, "batch length *rest"]:
    """Returns the buffer with each row's values written from its own start on."""
    return jax.vmap(lambda row, new, first: jax.lax.dynamic_update_slice_in_dim(row, new, first, axis=0))(
        buffer, values, start
    )


def _written(cached: FloatBKHD, new: FloatBQHD, write_at: IntB | IntBQ) -> FloatBKHD:
    """Returns the cached keys or values of a layer with the queries' own written."""
    return write_rows(cached, new, write_at) if write_at.ndim == 1 else put_slots(cached, write_at, new)


class Attention(nnx.Module):
    """Self-attention over the same rows or their cached keys, or cross-attention over another sequence's."""

    def __init__(self, key: KeyScalar, config: ModelConfig):
        embed, heads, kv_heads, head_dim = config.embed_dim, config.num_heads, config.kv_heads, config.head_dim
        keys = jax.random.split(key, 4)
        # T5 folds the usual 1/sqrt(head_dim) into the query's initialiser; where attention_scale holds it, not here.
        query_variance = 1 / (embed * head_dim * config.attention_scale**2)
        self.query = param(keys[0], normal(query_variance), embed=embed, heads=heads, head_dim=head_dim)
        self.key = param(keys[1], normal(1 / embed), embed=embed, kv_heads=kv_heads, head_dim=head_dim)
        self.value = param(keys[2], normal(1 / embed), embed=embed, kv_heads=kv_heads, head_dim=head_dim)
        self.out = param(keys[3], normal(1 / (heads * head_dim)), heads=heads, head_dim=head_dim, embed=embed)
        zeros = jax.nn.initializers.zeros
        self.query_bias = param(key, zeros, heads=heads, head_dim=head_dim) if config.qkv_bias else None
        self.key_bias = param(key, zeros, kv_heads=kv_heads, head_dim=head_dim) if config.qkv_bias else None
        self.value_bias = param(key, zeros, kv_heads=kv_heads, head_dim=head_dim) if config.qkv_bias else None
        self.out_bias = param(key, zeros, embed=embed) if config.output_bias else None
        if config.query_key_norm:
            self.query_norm = RMSNorm(config.norm_epsilon, config.norm_offset, head_dim=head_dim)
            self.key_norm = RMSNorm(config.norm_epsilon, config.norm_offset, head_dim=head_dim)
        elif config.whole_query_key_norm:
            self.query_norm = RMSNorm(config.norm_epsilon, heads=heads, head_dim=head_dim)
            self.key_norm = RMSNorm(config.norm_epsilon, kv_heads=kv_heads, head_dim=head_dim)
        self.config = config

    def __call__(
        self,
        x: FloatBLD,
        positions: AnyIntBL,
        sight: Sight,
        bias: FloatNHQK | None,
        frequencies: Float[Array, " half_head_dim"] | None = None,
        cached: tuple[FloatBKHD, FloatBKHD] | None = None,
        write_at: IntB | IntBQ | None = None,
    ) -> tuple[FloatBLD, tuple[FloatBKHD, FloatBKHD] | None]:
        """Returns self-attention of x.

        Args:
          x: the queries' hidden states.
          positions: the queries' positions, for rotary positions.
          sight: the keys that the queries see.
          bias: one for each of some equal groups of rows, or None.
          frequencies: for rotary positions; None if there are none.
          cached: this layer's keys and values; the queries' own are written into them first. None attends over x
            itself.
          write_at: the slot of each row's first query, or of every query; with `cached` only.

        Returns:
          The attention, and the keys and values with the queries' own written (None without a cache).
        """
        query = self._project_query(x)
        key, value = self.keys_values(x)
        if frequencies is not None:
            query, key = (rotate(y, positions, frequencies) for y in (query, key))
        if cached is not None:
            assert write_at is not None
            key, value = (_written(old, new, write_at) for old, new in zip(cached, (key, value), strict=True))
            cached = (key, value)
        return self._attend(query, key, value, bias, sight), cached

    def cross(self, x: FloatBLD, key: FloatBKHD, value: FloatBKHD, sight: Sight) -> FloatBLD:
        """Returns attention of x over the keys and values of other hidden states, without positions.

        Args:
          x: the queries' hidden states.
          key, value: see `keys_values`.
          sight: the keys that the queries see.
        """
        return self._attend(self._project_query(x), key, value, None, sight)

    def keys_values(self, x: FloatBLD) -> tuple[FloatBKHD, FloatBKHD]:
        """Returns keys and values of hidden states, not rotated."""
        key = add_bias(dense(x, self.key.get_value()), self.key_bias)
        value = add_bias(dense(x, self.value.get_value()), self.value_bias)
        return self.key_norm(key) if self._norms else key, value

    @property
    def _norms(self):
        return self.config.query_key_norm or self.config.whole_query_key_norm

    def _project_query(self, x):
        query = add_bias(dense(x, self.query.get_value()), self.query_bias)
        return self.query_norm(query) if self._norms else query

    def _attend(self, query, key, value, bias, sight):
        # Queries are cut along the length; keys and values of the whole rows come to each of them.
        query = constrain(query, QUERIES)
        key, value = constrain(key, KEYS), constrain(value, KEYS)
        attended = attend(self.config, query, key, value, bias, sight)
        return add_bias(dense(attended, self.out.get_value(), inputs=2), self.out_bias)
