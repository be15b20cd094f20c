"""The decoder-only Transformer, in the manner of T5 1.1."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.attention import Attention, KVCache
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.layers import GatedMLP, RMSNorm, dropout, fold_in, normal, param
from diffusion_t5x.models.masks import AttentionKind, Slots
from diffusion_t5x.models.positions import RelativePositionBias
from diffusion_t5x.partitioning import constrain

Params = dict[str, Any]

# Logits of one piece of `map_logits`, per row: a piece of a 256k vocabulary spans 16 positions, and a small
# vocabulary is read out in one go.
MAX_LOGITS_PER_ROW = 1 << 22


class Block(nnx.Module):
    """Attention and a feed-forward layer, each normed before and added to the residual stream."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_epsilon)
        self.attention = Attention(attention_key, config)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_epsilon)
        self.mlp = GatedMLP(mlp_key, config.embed_dim, config.mlp_dim, config.activation, config.dropout_rate)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x, positions, mask, bias, cached, write_at, dropout_keys):
        keys = [fold_in(dropout_keys, use) for use in range(3)]
        attended, cached = self.attention(self.attention_norm(x), positions, mask, bias, cached, write_at)
        x = constrain(x + dropout(attended, self.dropout_rate, keys[0]), ("batch", "length", "embed"))
        fed = self.mlp(self.mlp_norm(x), keys[1])
        return constrain(x + dropout(fed, self.dropout_rate, keys[2]), ("batch", "length", "embed")), cached


class Transformer(nnx.Module):
    """Tokens in, hidden states out; it knows tokens, attention kinds and its cache, and no noise and no loss."""

    def __init__(self, key: jax.Array, config: ModelConfig, vocabulary: TokenIds):
        embed_key, block_key, bias_key, head_key = jax.random.split(key, 4)
        self.embedding = param(embed_key, normal(1.0), vocab=config.vocab_size, embed=config.embed_dim)
        self.blocks = jax.vmap(lambda k: Block(k, config))(jax.random.split(block_key, config.num_layers))
        self.final_norm = RMSNorm(config.embed_dim, config.norm_epsilon)
        if config.position == "relative":
            self.relative_bias = RelativePositionBias(
                bias_key, config.num_heads, config.relative_buckets, config.relative_max_distance
            )
        if not config.tie_embeddings:
            self.head = param(head_key, normal(1 / config.embed_dim), embed=config.embed_dim, vocab=config.vocab_size)
        self.config = config
        self.vocabulary = vocabulary

    def __call__(
        self, tokens: jax.Array, slots: Slots, kind: AttentionKind, dropout_keys: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states `[B, L, D]` of whole rows of tokens, int32 `[B, L]`.

        Args:
          tokens: what stands in the slots.
          slots: what the slots are.
          kind: who sees whom.
          dropout_keys: `[B]`, a key for each row; None switches dropout off.
        """
        # Slots of one segment are as far apart as their positions, so one bias serves all rows, packed ones too.
        index = jnp.arange(tokens.shape[1])[None]
        hidden, _ = self._run(tokens, slots, kind.mask(slots, slots), (index, index), None, None, dropout_keys)
        return hidden

    def extend(
        self, tokens: jax.Array, kind: AttentionKind, cache: KVCache, write_at: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states of the next tokens of each row, and the cache with their keys and values.

        Args:
          tokens: int32 `[B, Lq]`.
          kind: the attention kind; what it lets the queries see must have been written, or be among them.
          cache: of the rows.
          write_at: int32 `[B]`, the slot of each row's first token.
        """
        queries = cache.slots.take(write_at, tokens.shape[1])
        mask = kind.mask(queries, cache.slots)
        positions = (queries.positions, cache.slots.positions)
        cached = (cache.keys, cache.values)
        hidden, (keys, values) = self._run(tokens, queries, mask, positions, cached, write_at, None)
        return hidden, cache.replace(keys=keys, values=values)

    def _run(self, tokens, slots, mask, bias_positions, cached, write_at, dropout_keys):
        config = self.config
        keys = [fold_in(dropout_keys, use) for use in range(3)]
        x = self.embedding.get_value()[tokens].astype(config.dtype)
        x = constrain(dropout(x, config.dropout_rate, keys[0]), ("batch", "length", "embed"))
        bias = self.relative_bias(*bias_positions) if config.position == "relative" else None

        def layer(x, scanned):
            block, cached, number = scanned
            return block(x, slots.positions, mask, bias, cached, write_at, fold_in(keys[1], number))

        if config.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
            layer = jax.checkpoint(layer, policy=policy)
        layers = (self.blocks, cached, jnp.arange(config.num_layers))
        x, cached = jax.lax.scan(layer, x, layers, unroll=config.scan_unroll)
        return dropout(self.final_norm(x), config.dropout_rate, keys[2]), cached

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 `[..., V]` of hidden states `[..., D]`."""
        kernel = self.embedding.get_value().T if self.config.tie_embeddings else self.head.get_value()
        return jnp.matmul(
            hidden * jnp.asarray(self.config.readout_scale, hidden.dtype),
            kernel.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    def map_logits(self, fn: Callable[..., Any], hidden: jax.Array, *per_position: Any) -> Any:
        """`fn(logits, *per_position)` over pieces of the length, so that large logits never stand whole in memory.

        Args:
          fn: maps float32 logits `[B, l, V]` and its other arguments, cut to the same l positions, to a pytree of
            arrays `[B, l, ...]`. It runs again in the backward pass.
          hidden: `[B, L, D]`.
          *per_position: pytrees of arrays `[B, L, ...]`.

        Returns:
          fn's results, put together again: arrays `[B, L, ...]`.
        """
        length = hidden.shape[1]
        piece = max(1, MAX_LOGITS_PER_ROW // self.config.vocab_size)
        if piece >= length:
            return fn(self.logits(hidden), *per_position)
        padding = -length % piece

        def cut(x):
            x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], -1, piece, *x.shape[2:]), 1, 0)

        def join(x):
            x = jnp.moveaxis(x, 0, 1)
            return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

        @jax.checkpoint
        def one(pieces):
            return fn(self.logits(pieces[0]), *pieces[1])

        return jax.tree.map(join, jax.lax.map(one, jax.tree.map(cut, (hidden, per_position))))


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """A model's structure, apart from its parameters: those are a nested dict of float32 arrays.

    Attributes:
      config: dimensions and choices.
      vocabulary: what the rows of the embedding mean.

    Raises:
      UserError: the config's vocab_size is too small for the vocabulary.
    """

    config: ModelConfig
    vocabulary: TokenIds

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", self.config.with_vocabulary(self.vocabulary.size))

    def _build(self, key: jax.Array) -> Transformer:
        return Transformer(key, self.config, self.vocabulary)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters. Jit it with output shardings, and nothing stands whole on one device."""
        return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return nnx.to_pure_dict(self._split[1])

    def axes(self) -> Params:
        """Logical axis names of the parameters, a tuple for each: what partitioning maps to the mesh."""
        names = jax.tree.map(
            lambda variable: variable.get_metadata("axes"),
            self._split[1],
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        names = nnx.to_pure_dict(names)
        stacked = jax.tree.map(lambda axes: ("layers", *axes), names["blocks"], is_leaf=lambda x: isinstance(x, tuple))
        return {**names, "blocks": stacked}

    def bind(self, params: Params) -> Transformer:
        """The model with these parameters."""
        graph, abstract = self._split
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract()))
