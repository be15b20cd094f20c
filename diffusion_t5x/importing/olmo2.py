"""OLMo 2 (arXiv 2501.00656): Llama that norms what layers write, not what they read, and all heads as one vector."""

from diffusion_t5x.importing import llama
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight, under, vector
from diffusion_t5x.models.config import ModelConfig


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.require("attention_bias", False)
    fields = llama.shared(keys) | {"norm_epsilon": keys.get("rms_norm_eps", 1e-5)}
    return ModelConfig(tie_embeddings=tied, pre_norms=False, post_norms=True, whole_query_key_norm=True, **fields)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    kept = (w for w in llama.weights(config) if not w.ours.endswith(("attention_norm/scale", "mlp_norm/scale")))
    norms = under(
        {"model.layers.{}.": "decoder/blocks/"},
        vector("post_attention_layernorm.weight", "attention_post_norm/scale"),
        vector("post_feedforward_layernorm.weight", "mlp_post_norm/scale"),
        vector("self_attn.q_norm.weight", "attention/query_norm/scale"),
        vector("self_attn.k_norm.weight", "attention/key_norm/scale"),
    )
    return (*kept, *norms)
