"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer."""

from diffusion_t5x.importing import llama, mixtures
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.experts import Experts

ALIASES = {"num_experts": "num_local_experts"}
_HARMLESS = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # of training
_PARTS = {"w1": "wi_0", "w3": "wi_1", "w2": "wo"}


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore(*_HARMLESS)
    fields = llama.shared(keys, kv_heads=8) | {"norm_epsilon": keys.get("rms_norm_eps", 1e-5)}
    fields |= llama.rotary(keys, 1_000_000.0, fields["head_dim"])
    window = keys.nullable("sliding_window", None)
    kinds = [window is not None] * fields["num_layers"]
    experts = Experts(
        number=keys.get("num_local_experts", 8),
        per_token=keys.get("num_experts_per_tok", 2),
        mlp_dim=fields["mlp_dim"],
    )
    return ModelConfig(tie_embeddings=tied, experts=experts, **fields, **llama.local_layers(keys, kinds, window))


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    return mixtures.weights(config, llama.weights(config), "block_sparse_moe", _PARTS)
