"""Qwen3's mixtures of experts (arXiv 2505.09388)."""

from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import llama, mixtures, qwen3
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.experts import Experts

ALIASES = {"num_experts": "num_local_experts"}
# The weight of a loss of training, another one than ours; and the window that use_sliding_window would switch on.
_HARMLESS = ("max_window_layers", "output_router_logits", "router_aux_loss_coef", "sliding_window")


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore(*_HARMLESS)
    keys.require("attention_bias", False)
    keys.require("use_sliding_window", False)
    keys.require("decoder_sparse_step", 1)
    fields = llama.shared(keys, kv_heads=4)
    layers = fields["num_layers"]
    dense = keys.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(layer, int) and 0 <= layer < layers for layer in dense):
        raise UserError(
            f"{keys.where}: mlp_only_layers = {dense!r} should be a list of layers, from 0 to {layers - 1}."
        )
    experts = Experts(
        number=keys.get("num_local_experts", 128),
        per_token=keys.get("num_experts_per_tok", 8),
        mlp_dim=keys.get("moe_intermediate_size", 768),
        dense_layers=mixtures.first_dense(keys, "mlp_only_layers", [layer in dense for layer in range(layers)]),
        normalize=keys.require("norm_topk_prob", False, True),
    )
    keys.list_of("layer_types", layers, "full_attention")
    return ModelConfig(tie_embeddings=tied, query_key_norm=True, experts=experts, **fields)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    return mixtures.weights(config, qwen3.weights(config))
