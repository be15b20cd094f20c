"""GPT-2: layer norms, learned positions, biases everywhere, feed-forward layers without a gate."""

from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight, table, under, vector
from diffusion_t5x.models.config import ModelConfig

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Dropout, training, the head of a classifier, and how attention is computed.
_HARMLESS = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "n_special", "predict_special_tokens",
    "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj",
)  # fmt: skip


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore(*_HARMLESS)
    keys.require("activation_function", "gelu_new", "gelu_pytorch_tanh")  # two names of one function
    keys.require("add_cross_attention", False)
    keys.require("scale_attn_by_inverse_layer_idx", False)
    keys.require("scale_attn_weights", True)
    embed, heads = keys.get("n_embd"), keys.get("n_head")
    return ModelConfig(
        embed_dim=embed,
        num_layers=keys.layers("n_layer"),
        num_heads=heads,
        head_dim=embed // heads,
        mlp_dim=keys.get("n_inner", 4 * embed),
        position="learned",
        norm="layer",
        activation="gelu",
        gated=False,
        tie_embeddings=tied,
        qkv_bias=True,
        output_bias=True,
        attention_scale=(embed // heads) ** -0.5,
        logits_scale=1.0,
        norm_epsilon=keys.get("layer_norm_epsilon", 1e-5),
        max_length=keys.get("n_positions"),
    )


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors, like `llama.weights`. Matrices are `[in, out]`; query, key and value are joined."""
    parts = [(name, (number, 3)) for number, name in enumerate(("query", "key", "value"))]
    block = under(
        {"transformer.h.{}.": "decoder/blocks/"},
        *_norm("ln_1", "attention_norm"),
        *(Weight("attn.c_attn.weight", f"attention/{name}", transposed=False, part=part) for name, part in parts),
        *(Weight("attn.c_attn.bias", f"attention/{name}_bias", inputs=0, part=part) for name, part in parts),
        Weight("attn.c_proj.weight", "attention/out", inputs=2, transposed=False),
        vector("attn.c_proj.bias", "attention/out_bias"),
        *_norm("ln_2", "mlp_norm"),
        Weight("mlp.c_fc.weight", "mlp/wi_0", transposed=False),
        vector("mlp.c_fc.bias", "mlp/wi_0_bias"),
        Weight("mlp.c_proj.weight", "mlp/wo", transposed=False),
        vector("mlp.c_proj.bias", "mlp/wo_bias"),
    )
    head = () if config.tie_embeddings else (Weight(HEAD, "head"),)
    return (
        table(EMBEDDING, "embedding"),
        table("transformer.wpe.weight", "decoder/positions/embedding"),
        *block,
        *_norm("transformer.ln_f", "decoder/final_norm"),
        *head,
    )


def _norm(theirs: str, ours: str) -> tuple[Weight, Weight]:
    return vector(f"{theirs}.weight", f"{ours}/scale"), vector(f"{theirs}.bias", f"{ours}/bias")
