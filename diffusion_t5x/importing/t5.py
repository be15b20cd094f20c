"""T5 1.1 (arXiv 2002.05202) and FLAN-T5: encoder-decoders with causal buckets in the decoder."""

from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight, table, under, vector
from diffusion_t5x.models.config import Activation, ModelConfig

EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"
# Copies that some files hold.
COPIES = {"encoder.embed_tokens.weight": EMBEDDING, "decoder.embed_tokens.weight": EMBEDDING}
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
_ACTIVATIONS: dict[str, Activation] = {"gated-gelu": "gelu", "gated-silu": "silu"}
_NAMES = {"gelu": ("gelu_new", "gelu_pytorch_tanh"), "silu": ("silu", "swish")}  # of the same functions


def config(keys: Keys, tied: bool, feed_forward: str = "relu") -> ModelConfig:
    """Builds the ModelConfig.

    Args:
      keys: keys of the config.json.
      tied: True if the embedding also computes the logits.
      feed_forward: the kind of feed-forward layers if the config.json does not say.
    """
    layers, embed = keys.layers("num_layers"), keys.get("d_model")
    keys.require("num_decoder_layers", layers)
    keys.require("is_encoder_decoder", True)
    activation = _ACTIVATIONS[keys.require("feed_forward_proj", *_ACTIVATIONS, default=feed_forward)]
    # These two follow from it, but would overrule it.
    keys.require("is_gated_act", True)
    keys.require("dense_act_fn", *_NAMES[activation])
    # T5 scales its logits, T5 1.1 does not: newer files say so themselves, older ones by `tie_word_embeddings`.
    scaled = keys.get("scale_decoder_outputs", keys.get("tie_word_embeddings", True))
    return ModelConfig(
        embed_dim=embed,
        num_layers=layers,
        num_heads=keys.get("num_heads"),
        head_dim=keys.get("d_kv"),
        mlp_dim=keys.get("d_ff"),
        architecture="encoder_decoder",
        activation=activation,
        tie_embeddings=tied,
        logits_scale=embed**-0.5 if scaled else 1.0,
        norm_epsilon=keys.get("layer_norm_epsilon", 1e-6),
        relative_buckets=keys.get("relative_attention_num_buckets", 32),
        relative_max_distance=keys.get("relative_attention_max_distance", 128),
        causal_buckets=True,
    )


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns all weights; with an output matrix only if the embedding is not tied."""
    head = () if config.tie_embeddings else (Weight(HEAD, "head"),)
    encoder = (*_sublayer("0.", "SelfAttention", "attention"), *_feed_forward("1."))
    decoder = (
        *_sublayer("0.", "SelfAttention", "attention"),
        *_sublayer("1.", "EncDecAttention", "cross_attention"),
        *_feed_forward("2."),
    )
    return (table(EMBEDDING, "embedding"), *_stack("encoder", encoder), *_stack("decoder", decoder), *head)


def _sublayer(number: str, theirs: str, ours: str) -> tuple[Weight, ...]:
    return (
        vector(f"{number}layer_norm.weight", f"{ours}_norm/scale"),
        *under(
            {f"{number}{theirs}.": f"{ours}/"},
            Weight("q.weight", "query"),
            Weight("k.weight", "key"),
            Weight("v.weight", "value"),
            Weight("o.weight", "out", inputs=2),
        ),
    )


def _feed_forward(number: str) -> tuple[Weight, ...]:
    matrices = (Weight(f"{name}.weight", name) for name in ("wi_0", "wi_1", "wo"))
    norm = vector(f"{number}layer_norm.weight", "mlp_norm/scale")
    return (norm, *under({f"{number}DenseReluDense.": "mlp/"}, *matrices))


def _stack(name: str, block: tuple[Weight, ...]) -> tuple[Weight, ...]:
    bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        *under({f"{name}.block.{{}}.layer.": f"{name}/blocks/"}, *block),
        table(bias, f"{name}/relative_bias/embedding"),
        vector(f"{name}.final_layer_norm.weight", f"{name}/final_norm/scale"),
    )
