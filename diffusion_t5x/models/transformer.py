"""The Transformer, decoder-only or encoder-decoder, in the style of T5 1.1."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models import products
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.layers import fold_in, normal, param, softcap
from diffusion_t5x.models.masks import BIDIRECTIONAL, Annealed, AttentionKind, Slots
from diffusion_t5x.models.output import Output, merged
from diffusion_t5x.models.quantized import is_quantized
from diffusion_t5x.models.stack import STACKED, Encoded, Stack
from diffusion_t5x.partitioning import constrain, copies, pieces_of
from diffusion_t5x.shapes import AnyIntBL, FloatBLD, FloatBQD, IntB, IntBQ, KeyB, KeyScalar

Params = dict[str, Any]

# Logits of one piece of `map_logits` on a device, 256 MiB of them: of a 256k vocabulary those of 256 positions, enough
# to keep a device busy that reads the whole matrix for each piece. A small vocabulary is read out in one go.
MAX_LOGITS = 1 << 26


class Transformer(nnx.Module):
    """Maps tokens to hidden states. It has tokens, attention kinds and a cache, but no noise and no loss."""

    def __init__(self, key: KeyScalar, config: ModelConfig, vocabulary: TokenIds):
        embed_key, decoder_key, encoder_key, head_key = jax.random.split(key, 4)
        has_encoder = config.architecture == "encoder_decoder"
        self.embedding = param(embed_key, normal(1.0), vocab=config.num_embeddings, embed=config.embed_dim)
        if has_encoder:
            self.encoder = Stack(encoder_key, dataclasses.replace(config, causal_buckets=False))
        self.decoder = Stack(decoder_key, config, cross_attention=has_encoder)
        if not config.tie_embeddings:
            self.head = param(
                head_key, normal(1 / config.embed_dim), embed=config.embed_dim, vocab=config.num_embeddings
            )
        self.config = config
        self.vocabulary = vocabulary

    def encode(self, batch: Batch, dropout_keys: KeyB | None = None) -> Encoded | None:
        """Encodes a batch's inputs; None for a decoder-only model, which reads them among its tokens.

        Args:
          batch: with `encoder_tokens` if the model has an encoder.
          dropout_keys: a key for each row; None switches dropout off.
        """
        if self.config.architecture == "decoder_only":
            return None
        tokens, segment_ids, positions = batch.encoder_tokens, batch.encoder_segment_ids, batch.encoder_positions
        assert tokens is not None and segment_ids is not None and positions is not None
        slots = Slots(segment_ids=segment_ids, positions=positions, is_input=segment_ids > 0)
        x = self._embed(tokens)
        output = self.encoder(x, slots, BIDIRECTIONAL, dropout_keys=fold_in(dropout_keys, 0))
        keys, values = self.decoder.cross_keys_values(output.hidden)
        return Encoded(keys=keys, values=values, segment_ids=segment_ids, auxiliary=output.auxiliary)

    def __call__(
        self,
        tokens: AnyIntBL,
        slots: Slots,
        kind: AttentionKind | Annealed,
        encoded: Encoded | None = None,
        dropout_keys: KeyB | None = None,
    ) -> Output:
        """Returns hidden states of whole rows of tokens, and all auxiliary losses.

        Args:
          tokens: the tokens in the slots.
          slots: properties of the slots.
          kind: which slots attend to which.
          encoded: the inputs, from `encode`.
          dropout_keys: a key for each row; None switches dropout off.
        """
        output = self.decoder(self._embed(tokens), slots, kind, encoded, fold_in(dropout_keys, 1))
        return output if encoded is None else output.replace(auxiliary=merged(output.auxiliary, encoded.auxiliary))

    def extend(
        self,
        tokens: Int[jax.Array, "batch queries"],
        kind: AttentionKind,
        cache: KVCache,
        write_at: IntB | IntBQ,
        encoded: Encoded | None = None,
    ) -> tuple[FloatBQD, KVCache]:
        """Returns hidden states of some tokens of each row, and the cache with their keys and values.

        Args:
          tokens: the tokens.
          kind: the attention kind; everything it lets the queries see must have been written, or be among them.
          cache: cache of the rows.
          write_at: the slot of each row's first token, if they are consecutive; otherwise of every token. A token
            beyond the row's end sees nothing and is not written.
          encoded: the inputs, from `encode`.
        """
        slots = cache.slots
        queries = slots.take(write_at, tokens.shape[1]) if write_at.ndim == 1 else slots.at(write_at)
        cached = (cache.keys, cache.values)
        hidden, (keys, values) = self.decoder.extend(
            self._embed(tokens), queries, kind, slots, cached, write_at, encoded
        )
        return hidden, cache.replace(keys=keys, values=values)

    def _embed(self, tokens: AnyIntBL) -> FloatBLD:
        # Gathered whole: else rows are looked up in pieces of `embed`, and activations change places.
        embedded = constrain(self.embedding.get_value().astype(self.config.dtype), ("vocab", "embed"))[tokens]
        return embedded * jnp.asarray(self.config.embedding_scale, embedded.dtype)

    def _readout(self) -> Float[jax.Array, "embed vocab"]:
        """The output matrix."""
        kernel = self.embedding.get_value().T if self.config.tie_embeddings else self.head.get_value()
        return constrain(kernel, ("embed", "vocab"))

    def logits(self, hidden: Float[jax.Array, "batch *rest embed"]) -> Float[jax.Array, "batch *rest vocab"]:
        """Returns logits, float32, of hidden states."""
        return self._logits(hidden, self._readout()[None])

    def _logits(self, hidden, kernels):
        """Returns logits with kernels `[n, D, V]`, one for each of n equal groups of rows."""
        hidden = hidden * jnp.asarray(self.config.readout_scale, hidden.dtype)
        kernels = kernels.astype(hidden.dtype)
        pieces = hidden.reshape(len(kernels), -1, *hidden.shape[1:])
        if products.rounds(hidden):
            logits = jax.vmap(products.matmul)(pieces.reshape(len(kernels), -1, pieces.shape[-1]), kernels)
        else:
            logits = jnp.einsum("nb...d,ndv->nb...v", pieces, kernels, preferred_element_type=jnp.float32)
        return softcap(logits.reshape(*hidden.shape[:-1], -1), self.config.logits_softcap)

    def map_logits(self, fn: Callable[..., Any], hidden: FloatBLD, *per_position: Any) -> Any:
        """Computes `fn(logits, *per_position)` piece by piece along the length, to keep large logits out of memory.

        Args:
          fn: maps float32 logits `[B, l, V]` and its other arguments, cut to the same l positions, to a pytree of
            arrays `[B, l, ...]`. It runs again in the backward pass.
          hidden: hidden states.
          *per_position: pytrees of arrays `[B, L, ...]`.

        Returns:
          The results of fn, concatenated: arrays `[B, L, ...]`.
        """
        length, devices = hidden.shape[1], pieces_of("length")
        rows = max(1, hidden.shape[0] // pieces_of("batch"))
        piece = devices * max(1, MAX_LOGITS * pieces_of("vocab") // (rows * self.config.num_embeddings))
        if piece >= length:
            return fn(self.logits(hidden), *per_position)
        padding = -length % piece

        # Positions are dealt out in turn, so every piece has positions of every device.
        def cut(x):
            x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], piece, -1, *x.shape[2:]), 2, 0)

        def join(x):
            x = jnp.moveaxis(x, 0, 2)
            return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

        kernels = copies(self._readout(), ("embed", "vocab"), len(hidden))

        @jax.checkpoint
        def one(pieces):
            return fn(self._logits(pieces[0], kernels), *pieces[1])

        return jax.tree.map(join, jax.lax.map(one, jax.tree.map(cut, (hidden, per_position))))


def is_matrix(axes: Sequence[str]) -> bool:
    """True if logical axes belong to a matrix or an embedding, not to a norm, a bias, a table of biases or a router.

    A router is small, and computes in float32.
    """
    return "embed" in axes and "routes" not in axes and len(axes) > 1 + ("layers" in axes)


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """A model's structure, apart from its parameters, which are a nested dict of float32 arrays.

    Attributes:
      config: dimensions and choices.
      vocabulary: the meaning of the embedding's rows.

    Raises:
      UserError: the config's vocab_size is too small for the vocabulary.
    """

    config: ModelConfig
    vocabulary: TokenIds

    def __post_init__(self) -> None:
        vocabulary = dataclasses.replace(self.vocabulary, reads_start=self.config.reads_start)
        object.__setattr__(self, "vocabulary", vocabulary)
        object.__setattr__(self, "config", self.config.with_vocabulary(vocabulary.size))

    def _build(self, key: KeyScalar) -> Transformer:
        return Transformer(key, self.config, self.vocabulary)

    def init(self, key: KeyScalar) -> Params:
        """Fresh parameters. Under jit with output shardings, no array is whole on one device."""
        return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))

    def abstract(self) -> Params:
        """Returns shapes and dtypes of the parameters."""
        return nnx.to_pure_dict(self._split[1])

    def axes(self) -> Params:
        """Returns the logical axis names of the parameters, a tuple for each, which partitioning maps to the mesh."""

        def names(path, variable):
            stacked = ("layers",) if any(getattr(entry, "key", None) in STACKED for entry in path) else ()
            return (*stacked, *variable.get_metadata("axes"))

        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        return nnx.to_pure_dict(jax.tree_util.tree_map_with_path(names, self._split[1], is_leaf=is_variable))

    def as_read(self, params: Params) -> Params:
        """Returns the parameters in the dtypes that a pass reads: matrices and embeddings in `ModelConfig.dtype`.

        Passes compute the same; in bfloat16 the parameters take half the memory. Training needs them in float32.
        """

        def read(x, axes):
            return x.astype(self.config.dtype) if not is_quantized(x) and is_matrix(axes) else x

        return jax.tree.map(read, params, self.axes(), is_leaf=is_quantized)

    def trained(self) -> Params:
        """Returns a tree with True for each parameter that training changes."""
        return jax.tree.map(lambda _: True, self.abstract())

    def bind(self, params: Params) -> Transformer:
        """Returns the model with these parameters."""
        graph, abstract = self._split
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract(), is_leaf=is_quantized))
