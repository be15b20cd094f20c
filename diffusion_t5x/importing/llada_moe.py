"""LLaDA-MoE (arXiv 2509.24389): a mixture of experts, trained by masked diffusion."""

from diffusion_t5x.importing import llama, mixtures, qwen3
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.experts import Experts

# Of training; and what the published code reads and does not use.
_HARMLESS = (
    "auto_map", "mask_token_id", "norm_topk_prob", "output_router_logits", "routed_scaling_factor",
    "router_aux_loss_coef",
)  # fmt: skip


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore(*_HARMLESS)
    keys.require("attention_bias", False)
    keys.require("moe_router_enable_expert_bias", False)
    keys.require("moe_router_score_function", "softmax")
    for name in ("clip_qkv", "router_num_group", "router_topk_group", "shared_expert_intermediate_size"):
        keys.require(name, None)
    renamed = keys.updated(Keys({"intermediate_size": keys.get("dense_intermediate_size")}, keys.where))
    fields = llama.shared(renamed) | {"norm_epsilon": keys.get("rms_norm_eps")}
    keys.ignore(*renamed.asked)
    has_experts = keys.list_of("moe_layer_freq", fields["num_layers"], 0, 1) or [1] * fields["num_layers"]
    experts = Experts(
        number=keys.get("num_experts"),
        per_token=keys.get("num_experts_per_tok"),
        mlp_dim=keys.get("expert_intermediate_size"),
        dense_layers=mixtures.first_dense(keys, "moe_layer_freq", [not each for each in has_experts]),
        normalize=False,
    )
    return ModelConfig(
        tie_embeddings=tied,
        reads_start=False,
        query_key_norm=keys.require("qk_layernorm", True, False),
        experts=experts,
        **fields,
    )


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    dense = qwen3.weights(config) if config.query_key_norm else llama.weights(config)
    return mixtures.weights(config, dense)
