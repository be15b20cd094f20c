"""LLaDA2 (arXiv 2512.15745) and LLaDA2.1: mixtures of experts, trained by masked diffusion in blocks."""

from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.editing import EditingDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.importing import llama, mixtures
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.published import Published, blocks
from diffusion_t5x.importing.weights import Weight, table, under, vector
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.experts import Experts

EMBEDDING = "model.word_embeddings.weight"
# Of training; how a program runs the model; and names of a thing that has another name, too.
_HARMLESS = (
    "auto_map", "block_size", "embedding_dropout", "mask_token_id", "max_window_layers", "output_dropout",
    "output_router_logits", "rotary_dim", "router_dtype", "sliding_window",
)  # fmt: skip


def config(keys: Keys, tied: bool) -> ModelConfig:
    """Builds the ModelConfig; same rules as `llama.config`."""
    keys.ignore(*_HARMLESS)
    for name in (
        "norm_head",
        "norm_softmax",
        "use_qkv_bias",
        "use_sliding_window",
        "using_split_qkv_in_self_attention",
    ):
        keys.require(name, False)
    for name in ("moe_router_enable_expert_bias", "norm_topk_prob", "use_qk_norm", "use_rmsnorm"):
        keys.require(name, True)
    keys.require("score_function", "sigmoid")
    keys.require("rope_scaling", None)
    keys.require("use_bias", False, default=True)
    fields = llama.dimensions(keys)
    inner, shared = keys.get("moe_intermediate_size"), keys.count("num_shared_experts")
    experts = Experts(
        number=keys.get("num_experts"),
        per_token=keys.get("num_experts_per_tok"),
        mlp_dim=inner,
        shared_mlp_dim=inner * shared,
        dense_layers=keys.count("first_k_dense_replace"),
        scores="sigmoid",
        scale=float(keys.get("routed_scaling_factor")),
        groups=keys.get("n_group"),
        groups_per_token=keys.get("topk_group"),
        selection_bias=True,
    )
    return ModelConfig(
        tie_embeddings=tied,
        reads_start=False,
        activation=keys.require("hidden_act", "silu"),
        attention_scale=fields["head_dim"] ** -0.5,
        query_key_norm=True,
        rotary_base=float(keys.get("rope_theta")),
        rotary_dim=int(fields["head_dim"] * keys.get("partial_rotary_factor")),
        experts=experts,
        **fields,
    )


def published(keys: Keys) -> Published:
    """Decoding as in the repository's generate: what is above a confidence of 0.95, one token at least."""
    size = keys.get("block_size", 32)
    inner = MaskedDecoder(num_steps=size, counts="index", threshold=0.95, softmax="all")
    return blocks(BlockDecoder(size, inner, blocks_from="row"), "llada2")


def published_editing(keys: Keys) -> Published:
    """Decoding of LLaDA2.1, which also replaces what it has written."""
    size = keys.get("block_size", 32)
    return blocks(BlockDecoder(size, EditingDecoder(softmax="all"), blocks_from="row"), "llada21")


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Maps parameters to tensors; same rules as `llama.weights`."""
    assert config.experts is not None
    heads, kv = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    ends, total = (0, heads, heads + kv, heads + 2 * kv), heads + 2 * kv
    parts = zip(("query", "key", "value"), ends, ends[1:], strict=False)
    joined = "attention.query_key_value.weight"
    dense = under(
        {"model.layers.{}.": mixtures.BLOCKS},
        vector("input_layernorm.weight", "attention_norm/scale"),
        *(Weight(joined, f"attention/{part}", rows=(start, end, total)) for part, start, end in parts),
        vector("attention.query_layernorm.weight", "attention/query_norm/scale"),
        vector("attention.key_layernorm.weight", "attention/key_norm/scale"),
        Weight("attention.dense.weight", "attention/out", inputs=2),
        vector("post_attention_layernorm.weight", "mlp_norm/scale"),
        *(Weight(f"mlp.{theirs}.weight", f"mlp/{ours}") for theirs, ours in mixtures.PARTS.items()),
    )
    shared = [Weight(f"shared_experts.{theirs}.weight", f"shared/{ours}") for theirs, ours in mixtures.PARTS.items()]
    more = (vector("gate.expert_bias", "selection_bias"), *(shared if config.experts.shared_mlp_dim else ()))
    head = () if config.tie_embeddings else (Weight(llama.HEAD, "head"),)
    final_norm = vector("model.norm.weight", "decoder/final_norm/scale")
    return mixtures.weights(config, (table(EMBEDDING, "embedding"), *dense, final_norm, *head), more=more)
