"""Phi-3 and Phi-3.5 mini (arXiv 2404.14219): Llama with queries, keys and values in one tensor, as gate and product."""

import dataclasses

from diffusion_t5x.importing import llama
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight
from diffusion_t5x.models.config import ModelConfig

_ONE = {
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore("auto_map", "embd_pdrop", "resid_pdrop")  # `transformers` has the code itself
    fields = llama.shared(keys) | {"norm_epsilon": keys.get("rms_norm_eps", 1e-5)}
    window = keys.nullable("sliding_window", None)
    kinds = [window is not None] * fields["num_layers"]
    return ModelConfig(tie_embeddings=tied, **fields, **llama.local_layers(keys, kinds, window))


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    heads, kv = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = {"q_proj": heads, "k_proj": kv, "v_proj": kv, "gate_proj": config.mlp_dim, "up_proj": config.mlp_dim}
    found: list[Weight] = []
    ends: dict[str, int] = {}
    for weight in llama.weights(config):
        own = weight.theirs.removeprefix("model.layers.{}.").removesuffix(".weight")
        if own in _ONE:
            joined = weight.theirs.replace(own, _ONE[own])
            start = ends.get(joined, 0)
            ends[joined] = start + sizes[own.split(".")[1]]
            total = sum(sizes[name.split(".")[1]] for name, one in _ONE.items() if one == _ONE[own])
            weight = dataclasses.replace(weight, theirs=joined, rows=(start, ends[joined], total))
        found.append(weight)
    return tuple(found)
