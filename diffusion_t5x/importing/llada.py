"""LLaDA 8B and 1.5 (arXiv 2502.09992): Llama in OLMo's names, trained by masked diffusion."""

from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.published import Published, masked
from diffusion_t5x.importing.weights import Weight, table, under, vector
from diffusion_t5x.models.config import ModelConfig

EMBEDDING = "model.transformer.wte.weight"
HEAD = "model.transformer.ff_out.weight"
ALIASES = {"weight_tying": "tie_word_embeddings"}
DECODER = MaskedDecoder(num_steps=32, window=32, softmax="all")
# Initial values, dropout, how attention is computed; and what the other kinds of block read.
_HARMLESS = (
    "alibi_bias_max", "attention_layer_norm_with_affine", "auto_map", "embedding_dropout", "embedding_size",
    "flash_attention", "init_cutoff_factor", "init_device", "init_fn", "init_std", "mask_token_id", "precision",
    "residual_dropout", "rope_full_precision",
)  # fmt: skip


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore(*_HARMLESS)
    required = {
        "block_type": "llama",
        "block_group_size": 1,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "rope": True,
        "activation_type": "silu",
    }
    for name, value in required.items():
        keys.require(name, value)
    for name in ("alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias", "include_qkv_bias",
                 "input_emb_norm", "scale_logits"):  # fmt: skip
        keys.require(name, False)
    keys.require("clip_qkv", None)
    embed, heads = keys.get("d_model"), keys.get("n_heads")
    one_head = 1 if keys.get("multi_query_attention", False) else heads
    return ModelConfig(
        embed_dim=embed,
        num_layers=keys.layers("n_layers"),
        num_heads=heads,
        head_dim=embed // heads,
        mlp_dim=keys.get("mlp_hidden_size", keys.get("mlp_ratio", 4) * embed),
        num_kv_heads=keys.get("n_kv_heads", one_head),
        reads_start=False,
        position="rotary",
        activation="silu",
        tie_embeddings=tied,
        attention_scale=(embed // heads) ** -0.5,
        logits_scale=1.0,
        norm_epsilon=keys.get("rms_norm_eps", 1e-5),
        rotary_base=float(keys.get("rope_theta", 10_000.0)),
        max_length=keys.get("max_sequence_length"),
    )


def vocab_size(keys: Keys) -> int:
    """Rows of the embedding, which may be more than the ids."""
    return keys.get("embedding_size", keys.get("vocab_size"))


def published(keys: Keys) -> Published:
    """Decoding as in the repository's generate.py: windows of 32 tokens, one token per step."""
    del keys
    return masked(DECODER, "llada")


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    block = under(
        {"model.transformer.blocks.{}.": "decoder/blocks/"},
        vector("attn_norm.weight", "attention_norm/scale"),
        Weight("q_proj.weight", "attention/query"),
        Weight("k_proj.weight", "attention/key"),
        Weight("v_proj.weight", "attention/value"),
        Weight("attn_out.weight", "attention/out", inputs=2),
        vector("ff_norm.weight", "mlp_norm/scale"),
        Weight("ff_proj.weight", "mlp/wi_0"),
        Weight("up_proj.weight", "mlp/wi_1"),
        Weight("ff_out.weight", "mlp/wo"),
    )
    head = () if config.tie_embeddings else (Weight(HEAD, "head"),)
    final_norm = vector("model.transformer.ln_f.weight", "decoder/final_norm/scale")
    return (table(EMBEDDING, "embedding"), *block, final_norm, *head)
