"""Gemma 2 (arXiv 2408.00118): windows in every other layer, capped products and logits, norms behind each branch."""

from typing import Any

from diffusion_t5x.conversion import llama
from diffusion_t5x.conversion.keys import Keys
from diffusion_t5x.conversion.weights import Weight, under, vector
from diffusion_t5x.models.config import ModelConfig

EMBEDDING, HEAD, TIED, SAME = llama.EMBEDDING, llama.HEAD, True, llama.SAME
_NORMS = {
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    return ModelConfig(tie_embeddings=tied, **shared(keys, every=2), **llama.rotary(keys))


def shared(keys: Keys, every: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, rotary positions apart.

    Args:
      keys: of the config.json.
      every: one layer in so many sees everything, where the config.json has no `layer_types`.
    """
    keys.require("attention_bias", False)
    keys.require("use_bidirectional_attention", False)
    keys.require("hidden_act", "gelu_pytorch_tanh")
    keys.require("hidden_activation", "gelu_pytorch_tanh")
    keys.ignore("cache_implementation")
    fields = llama.dimensions(keys)
    layers = range(1, fields["num_layers"] + 1)
    kinds = keys.get("layer_types", ["sliding_attention" if i % every else "full_attention" for i in layers])
    return fields | {
        "activation": "gelu",
        "attention_scale": keys.get("query_pre_attn_scalar") ** -0.5,
        "norm_offset": True,
        "post_norms": True,
        "embedding_scale": fields["embed_dim"] ** 0.5,
        "attention_softcap": keys.get("attn_logit_softcapping", None),
        "logits_softcap": keys.get("final_logit_softcapping", None),
        "local_layers": tuple(kind == "sliding_attention" for kind in kinds),
        "window": keys.get("sliding_window"),
    }


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """As `llama.weights`."""
    kept = (w for w in llama.weights(config) if not w.ours.endswith("mlp_norm/scale"))
    norms = under({"model.layers.{}.": "decoder/blocks/"}, *(vector(there, here) for here, there in _NORMS.items()))
    return (*kept, *norms)
