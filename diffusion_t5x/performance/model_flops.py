"""FLOPs of a model's matrix products, by its shapes: two per multiplication.

The convention of PaLM's appendix B (arXiv 2204.02311): attention counts every pair of slots, seen or hidden; softmax,
norms and activations do not count; a backward pass takes twice its forward pass; what is computed again to save memory
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
    """FLOPs of one row in one forward pass.

    Args:
      config: with `vocab_size` set.
      length: slots that the (decoder's) stack reads.
      keys: slots that each of them may see; None is `length`. More where a cache holds those before.
      predicted: slots whose logits are computed; None is all.
      encoder_length: slots of an encoder-decoder's inputs.
      encodes: the inputs pass through the encoder, which happens once where the decoder reads several times.
    """
    layer = length * (_projections(config) + _attention(config, keys or length) + _feed_forward(config))
    if encoder_length:
        layer += length * (_cross_queries(config) + _attention(config, encoder_length))
        if encodes:
            encode = _projections(config) + _attention(config, encoder_length) + _feed_forward(config)
            layer += encoder_length * (encode + _cross_keys_values(config))
    logits = 2 * config.embed_dim * config.num_embeddings * (length if predicted is None else predicted)
    return config.num_layers * layer + logits


def _projections(config: ModelConfig) -> int:
    """Queries, keys, values and output of self-attention, for a slot."""
    return 4 * config.embed_dim * config.head_dim * (config.num_heads + config.kv_heads)


def _attention(config: ModelConfig, keys: int) -> int:
    """Scores and weighted sums, for a slot."""
    return 4 * config.num_heads * config.head_dim * keys


def _feed_forward(config: ModelConfig) -> int:
    """The gate, where there is one, the other half and the way back, for a slot."""
    return (6 if config.gated else 4) * config.embed_dim * config.mlp_dim


def _cross_queries(config: ModelConfig) -> int:
    """Queries and output of the attention to the inputs, for a slot of the decoder."""
    return 4 * config.embed_dim * config.head_dim * config.num_heads


def _cross_keys_values(config: ModelConfig) -> int:
    """Keys and values of the attention to the inputs, for a slot of the encoder."""
    return 4 * config.embed_dim * config.head_dim * config.kv_heads
