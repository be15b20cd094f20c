"""Gemma 2 (arXiv 2408.00118): windows in every other layer, capped products and logits, norms after each branch."""

from typing import Any

from diffusion_t5x.importing import llama
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight, under, vector
from diffusion_t5x.models.config import ModelConfig

_NORMS = {
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    fields = shared(keys, every=2) | {
        "attention_softcap": keys.nullable("attn_logit_softcapping", 50.0),
        "logits_softcap": keys.nullable("final_logit_softcapping", 30.0),
    }
    return ModelConfig(tie_embeddings=tied, **fields, **llama.rotary(keys))


def shared(keys: Keys, every: int) -> dict[str, Any]:
    """Returns the settings that Gemma 2 and 3 share, without rotary positions.

    Args:
      keys: keys of the config.json.
      every: one layer in this many sees everything, if the config.json has no `layer_types`.
    """
    keys.require("attention_bias", False)
    keys.require("use_bidirectional_attention", False)
    keys.require("hidden_activation", "gelu_pytorch_tanh")
    fields = llama.dimensions(keys, kv_heads=4, head_dim=256)
    kinds = llama.layer_kinds(keys, fields["num_layers"], lambda layer: (layer + 1) % every > 0)
    windows = llama.local_layers(keys, kinds, keys.nullable("sliding_window", 4096))
    return (
        fields
        | windows
        | {
            "activation": "gelu",
            "attention_scale": keys.get("query_pre_attn_scalar", 256) ** -0.5,
            "norm_offset": True,
            "post_norms": True,
            "embedding_scale": fields["embed_dim"] ** 0.5,
        }
    )


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    kept = (w for w in llama.weights(config) if not w.ours.endswith("mlp_norm/scale"))
    norms = under({"model.layers.{}.": "decoder/blocks/"}, *(vector(there, here) for here, there in _NORMS.items()))
    return (*kept, *norms)
