"""FLOPs of a model's matrix products, from its shapes: two per multiplication.

The convention is that of PaLM's appendix B (arXiv 2204.02311): attention counts every pair of slots, visible or masked;
softmax, norms and activations do not count; a backward pass costs twice its forward pass; recomputation to save memory
does not count.
"""

from diffusion_t5x.models.config import ModelConfig


def forward_flops(
    config: ModelConfig,
    length: int,
    *,
    keys: int | None = None,
    predicted: int | None = None,
    encoder_length: int = 0,
    encodes: bool = True,
) -> int:
    """Returns the FLOPs of one row in one forward pass.

    Args:
      config: with `vocab_size` set.
      length: number of slots that the (decoder's) stack reads.
      keys: number of slots that each of them may see; None is `length`. More if a cache holds earlier ones.
      predicted: number of slots whose logits are computed; None is all.
      encoder_length: number of slots of an encoder-decoder's inputs.
      encodes: the inputs pass through the encoder, which happens once even if the decoder reads several times.
    """
    layer, fed_forward = length * (_projections(config) + _attention(config, keys or length)), length
    if encoder_length:
        layer += length * (_cross_queries(config) + _attention(config, encoder_length))
        if encodes:
            encode = _projections(config) + _attention(config, encoder_length)
            layer += encoder_length * (encode + _cross_keys_values(config))
            fed_forward += encoder_length
    logits = 2 * config.embed_dim * config.num_embeddings * (length if predicted is None else predicted)
    return config.num_layers * layer + fed_forward * _feed_forward(config) + logits


def _projections(config: ModelConfig) -> int:
    """Returns the FLOPs of self-attention's query, key, value and output products, per slot."""
    return 4 * config.embed_dim * config.head_dim * (config.num_heads + config.kv_heads)


def _attention(config: ModelConfig, keys: int) -> int:
    """Returns the FLOPs of scores and weighted sums, per slot."""
    return 4 * config.num_heads * config.head_dim * keys


def _feed_forward(config: ModelConfig) -> int:
    """Returns the FLOPs of the feed-forward products of all layers, including a gate if there is one, per slot.

    Of the experts, those count that read the slot.
    """
    dense = (6 if config.gated else 4) * config.embed_dim * config.mlp_dim
    experts = config.experts
    if experts is None:
        return config.num_layers * dense
    active = experts.per_token * experts.mlp_dim + experts.shared_mlp_dim
    mixture = config.embed_dim * (2 * experts.number + 6 * active)
    return config.dense_layers * dense + (config.num_layers - config.dense_layers) * mixture


def _cross_queries(config: ModelConfig) -> int:
    """Returns the FLOPs of cross-attention's query and output products, per slot of the decoder."""
    return 4 * config.embed_dim * config.head_dim * config.num_heads


def _cross_keys_values(config: ModelConfig) -> int:
    """Returns the FLOPs of cross-attention's key and value products, per slot of the encoder."""
    return 4 * config.embed_dim * config.head_dim * config.kv_heads
