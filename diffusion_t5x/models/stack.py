"""The stack of layers in encoders and decoders, in the style of T5 1.1."""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from diffusion_t5x.models.attention import Attention
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.layers import MLP, LayerNorm, RMSNorm, dropout, fold_in
from diffusion_t5x.models.low_rank import at_drafts
from diffusion_t5x.models.masks import Annealed, AttentionKind, Sight, Slots
from diffusion_t5x.models.mixture import Mixture
from diffusion_t5x.models.output import Auxiliaries, Output
from diffusion_t5x.models.positions import LearnedPositions, RelativePositionBias, rotary_frequencies
from diffusion_t5x.partitioning import constrain, copies
from diffusion_t5x.shapes import (
    AnyIntBL,
    Array,
    FloatBIHD,
    FloatBKHD,
    FloatBLD,
    FloatBQD,
    FloatNBLHD,
    FloatNHQK,
    IntB,
    IntBQ,
    KeyB,
    KeyScalar,
)

ACTIVATIONS = ("batch", "length", "embed")
# Names of a stack's parts whose parameters have an axis of layers before their own.
STACKED = frozenset({"dense_blocks", "blocks"})


class Encoded(flax.struct.PyTreeNode):
    """The encoded inputs as a decoder sees them: keys and values for every layer's cross-attention, computed once.

    Attributes:
      keys, values: of every layer.
      segment_ids: of the inputs; a target sees the inputs of its own segment.
      auxiliary: the encoder's own losses.
    """

    keys: FloatNBLHD
    values: FloatNBLHD
    segment_ids: AnyIntBL
    auxiliary: Auxiliaries = flax.struct.field(default_factory=dict)

    def repeat(self, times: int) -> Self:
        """Repeats every row `times` times, one after another."""
        return self.replace(
            keys=jnp.repeat(self.keys, times, axis=1),
            values=jnp.repeat(self.values, times, axis=1),
            segment_ids=jnp.repeat(self.segment_ids, times, axis=0),
        )


class View(flax.struct.PyTreeNode):
    """The keys that a layer's queries see, and the queries' positions.

    Attributes:
      positions: positions of the queries.
      sight: the keys that the queries see.
      bias: one for each of some equal groups of rows; None without relative positions.
      frequencies: see `rotary_frequencies`; None without rotary positions.
      write_at: the slot of each row's first query in the cache, or of every query; None without a cache.
      inputs_sight: the encoder's inputs that the queries see; None without an encoder.
      counted: the queries that count when the use of experts is measured.
    """

    positions: Int[Array, "batch queries"]
    sight: Sight
    bias: FloatNHQK | None
    frequencies: Float[Array, " half_head_dim"] | None
    write_at: IntB | IntBQ | None
    inputs_sight: Sight | None
    counted: Bool[jax.Array, "batch queries"]


def norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """Returns the configured norm of hidden states."""
    if config.norm == "layer":
        return LayerNorm(config.embed_dim, config.norm_epsilon)
    return RMSNorm(config.norm_epsilon, config.norm_offset, embed=config.embed_dim)


class Layer(nnx.Module):
    """Self-attention, in a decoder over an encoder also cross-attention, and a feed-forward layer.

    Each has a norm before it (`pre_norms`), after it (`post_norms`) or both, and is added to the residual stream.
    """

    def __init__(self, key: KeyScalar, config: ModelConfig, cross_attention: bool, dense: bool):
        attention_key, mlp_key, cross_key = jax.random.split(key, 3)
        if config.pre_norms:
            self.attention_norm = norm(config)
            self.mlp_norm = norm(config)
        self.attention = Attention(attention_key, config)
        if cross_attention:
            self.cross_attention_norm = norm(config)
            self.cross_attention = Attention(cross_key, config)
        options: dict[str, Any] = {"activation": config.activation, "dropout_rate": config.dropout_rate}
        self.mlp: MLP | Mixture
        if config.experts is None or dense:
            options |= {"gated": config.gated, "bias": config.output_bias}
            self.mlp = MLP(mlp_key, config.embed_dim, config.mlp_dim, **options)
        else:
            self.mlp = Mixture(mlp_key, config.embed_dim, config.experts, **options)
        if config.post_norms:
            self.attention_post_norm = norm(config)
            self.mlp_post_norm = norm(config)
        self.config = config

    def __call__(
        self,
        x: FloatBLD,
        view: View,
        cached: tuple[FloatBKHD, FloatBKHD] | None,
        inputs: tuple[FloatBIHD, FloatBIHD] | None,
        dropout_keys: KeyB | None,
    ) -> tuple[FloatBLD, tuple[FloatBKHD, FloatBKHD] | None, Auxiliaries]:
        """Returns hidden states after this layer, its cache with the queries' keys and values written, and its own
        losses.

        Args:
          x: hidden states.
          view: the keys that the queries see.
          cached: this layer's keys and values; None without a cache.
          inputs: this layer's keys and values of the inputs; None without an encoder.
          dropout_keys: a key for each row; None switches dropout off.
        """
        keys = [fold_in(dropout_keys, use) for use in range(4)]

        def add(x, branch, use):
            branch = branch * jnp.asarray(self.config.residual_scale, branch.dtype)
            return constrain(x + dropout(branch, self.config.dropout_rate, keys[use]), ACTIVATIONS)

        attended, cached = self.attention(
            self.attention_norm(x) if self.config.pre_norms else x,
            view.positions,
            view.sight,
            view.bias,
            view.frequencies,
            cached,
            view.write_at,
        )
        if self.config.post_norms:
            attended = self.attention_post_norm(attended)
        x = add(x, attended, 0)
        if inputs is not None:
            assert view.inputs_sight is not None
            x = add(x, self.cross_attention.cross(self.cross_attention_norm(x), *inputs, view.inputs_sight), 3)
        normed = self.mlp_norm(x) if self.config.pre_norms else x
        if isinstance(self.mlp, Mixture):
            branch, auxiliary = self.mlp(normed, keys[1], view.counted)
        else:
            branch, auxiliary = self.mlp(normed, keys[1])
        if self.config.post_norms:
            branch = self.mlp_post_norm(branch)
        return add(x, branch, 2), cached, auxiliary


class Stack(nnx.Module):
    """Layers, scanned over their stacked parameters, and the final norm.

    In a mixture of experts, the first layers may have none: they are stacked apart, as `dense_blocks`.
    """

    def __init__(self, key: KeyScalar, config: ModelConfig, cross_attention: bool = False):
        block_key, position_key = jax.random.split(key)
        keys = jax.random.split(block_key, config.num_layers)
        first = config.dense_layers
        if first:
            self.dense_blocks = jax.vmap(lambda k: Layer(k, config, cross_attention, dense=True))(keys[:first])
        self.blocks = jax.vmap(lambda k: Layer(k, config, cross_attention, dense=False))(keys[first:])
        self.final_norm = norm(config)
        if config.position == "relative":
            self.relative_bias = RelativePositionBias(
                position_key,
                config.num_heads,
                config.relative_buckets,
                config.relative_max_distance,
                config.causal_buckets,
            )
        elif config.position == "learned":
            assert config.max_length is not None
            self.positions = LearnedPositions(position_key, config.max_length, config.embed_dim)
        self.config = config

    def __call__(
        self,
        x: FloatBLD,
        slots: Slots,
        kind: AttentionKind | Annealed,
        encoded: Encoded | None = None,
        dropout_keys: KeyB | None = None,
    ) -> Output:
        """Returns hidden states and auxiliary losses of whole rows of embedded tokens.

        Args:
          x: embedded tokens.
          slots: their properties.
          kind: which slots attend to which.
          encoded: the inputs, for cross-attention.
          dropout_keys: a key for each row; None switches dropout off.
        """
        # Slots of one segment are as far apart as their indices, so one bias serves all rows, packed ones too.
        index = jnp.arange(x.shape[1])[None] if slots.index is None else slots.index
        output, _ = self._run(x, kind, slots, slots, (index, index), None, None, encoded, dropout_keys)
        return output

    def extend(
        self,
        x: FloatBQD,
        queries: Slots,
        kind: AttentionKind,
        slots: Slots,
        cached: tuple[FloatNBLHD, FloatNBLHD],
        write_at: IntB | IntBQ,
        encoded: Encoded | None,
    ) -> tuple[FloatBQD, tuple[FloatNBLHD, FloatNBLHD]]:
        """Same as `__call__` for some slots of each row, over the cached keys and values of the others.

        Args:
          x: embedded tokens.
          queries: their slots.
          kind: which slots attend to which.
          slots: slots of the whole rows.
          cached: keys and values of every layer.
          write_at: the slot of each row's first token, or of every token.
          encoded: the inputs, for cross-attention.

        Returns:
          Hidden states, and keys and values with those of x written.
        """
        positions = (queries.positions, slots.positions)
        output, cached = self._run(x, kind, queries, slots, positions, cached, write_at, encoded, None)
        return output.hidden, cached

    def cross_keys_values(self, hidden: FloatBLD) -> tuple[FloatNBLHD, FloatNBLHD]:
        """Returns every layer's keys and values of an encoder's hidden states."""
        return jax.vmap(lambda block: block.cross_attention.keys_values(hidden))(self.blocks)

    def _bias(self, positions, rows):
        """Returns the bias `[n, heads, Lq, Lk]`, one for each of n equal groups of rows."""
        query_positions, key_positions = positions
        axes = ("heads", "length", "keys")
        if len(query_positions) > 1:
            return constrain(self.relative_bias(query_positions, key_positions), ("batch", *axes))
        return copies(self.relative_bias(query_positions[0], key_positions[0]), axes, rows)

    def _run(self, x, kind, slots, key_slots, bias_positions, cached, write_at, encoded, dropout_keys):
        config = self.config
        sight, frequencies = Sight.of(kind, slots, key_slots, whole=cached is None), None
        if config.position == "rotary":
            stretching = (config.rotary_factor, config.rotary_stretched, config.rotary_ramp)
            frequencies = rotary_frequencies(config.rotated_dim, config.rotary_base, *stretching)
        keys = [fold_in(dropout_keys, use) for use in range(3)]
        if config.position == "learned":
            x = self.positions(x, slots.positions)
        x = constrain(dropout(x, config.dropout_rate, keys[0]), ACTIVATIONS)
        bias = self._bias(bias_positions, len(x)) if config.position == "relative" else None
        inputs = inputs_sight = None
        if encoded is not None:
            inputs = (encoded.keys, encoded.values)
            inputs_sight = Sight.across(slots.segment_ids, encoded.segment_ids, whole=cached is None)
        counted = jnp.asarray(slots.segment_ids > 0) & ~slots.is_input
        view = View(slots.positions, sight, bias, frequencies, write_at, inputs_sight, counted)
        of_layer, kinds = self._layer_views(view, slots, key_slots)
        drafts = None if slots.seen is None else slots.seen >= 0

        def layer(x, scanned):
            block, cached, inputs, number, kind = scanned
            block = at_drafts(block, drafts)
            layer_keys = fold_in(keys[1], number)
            x, cached, auxiliary = block(x, of_layer(kind), cached, inputs, layer_keys)
            return x, (cached, auxiliary)

        if config.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
            layer = jax.checkpoint(layer, policy=policy)
        x, cached, auxiliary = self._scan(layer, x, (cached, inputs, jnp.arange(config.num_layers), kinds))
        hidden = dropout(self.final_norm(x), config.dropout_rate, keys[2])
        return Output(hidden, {name: loss.over_layers() for name, loss in auxiliary.items()}), cached

    def _scan(self, layer, x, of_layers):
        """Runs all layers; `of_layers` has an axis of layers. Returns x, and the layers' caches and own losses."""
        unroll, first = self.config.layers_unrolled, self.config.dense_layers
        if not first:
            x, (cached, auxiliary) = jax.lax.scan(layer, x, (self.blocks, *of_layers), unroll=unroll)
            return x, cached, auxiliary
        before, after = jax.tree.map(lambda y: y[:first], of_layers), jax.tree.map(lambda y: y[first:], of_layers)
        x, (cached, _) = jax.lax.scan(layer, x, (self.dense_blocks, *before), unroll=min(unroll, first))
        rest = self.config.num_layers - first
        x, (more_cached, auxiliary) = jax.lax.scan(layer, x, (self.blocks, *after), unroll=min(unroll, rest))
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), cached, more_cached), auxiliary

    def _layer_views(self, view, slots, key_slots):
        """Returns a function from a layer's kind to its view, and the kinds of all layers, a pytree for the scan."""
        config, kinds = self.config, {}
        if config.local_layers:
            kinds["is_local"] = jnp.asarray(config.local_layers)
        if config.unrotated_layers:
            kinds["is_unrotated"] = jnp.asarray(config.unrotated_layers)
        near = view.sight.mask & slots.within(key_slots, config.window) if config.local_layers else None
        local_frequencies = view.frequencies
        if config.local_rotary_base is not None:
            local_frequencies = rotary_frequencies(config.rotated_dim, config.local_rotary_base)

        def of_layer(kind):
            seen = view
            if near is not None:
                mask = jnp.where(kind["is_local"], near, view.sight.mask)
                turns = jnp.where(kind["is_local"], local_frequencies, view.frequencies)
                seen = seen.replace(sight=view.sight.replace(mask=mask, order=None), frequencies=turns)
            if config.unrotated_layers:
                seen = seen.replace(frequencies=jnp.where(kind["is_unrotated"], 0, seen.frequencies))
            return seen

        return of_layer, kinds
