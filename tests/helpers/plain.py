"""A Transformer in plain numpy, without batches, caches or packing: what the real one is compared with."""

import jax
import numpy as np

from diffusion_t5x.models.positions import relative_position_bucket


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def norm(config, x, weights):
    if config.norm == "rms":
        return rms_norm(x, weights["scale"])
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weights["scale"] + weights[
        "bias"
    ]


def product(spec, x, weights, name):
    """With its bias, if it has one."""
    return np.einsum(spec, x, weights[name]) + weights.get(f"{name}_bias", 0)


def turn(x, positions):
    """Rotary positions of `[L, heads, D]`, by complex numbers."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    pairs = pairs * np.exp(1j * positions[:, None, None] * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


GATES = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def attend(config, weights, x, memory, mask, bias=None, positions=None):
    """Multi-head attention `[L, D]`, head by head."""
    query = product("ld,dhk->lhk", x, weights, "query")
    key, value = (product("ld,dhk->lhk", memory, weights, name) for name in ("key", "value"))
    if config.query_key_norm:
        query, key = rms_norm(query, weights["query_norm"]["scale"]), rms_norm(key, weights["key_norm"]["scale"])
    if config.position == "rotary" and positions is not None:
        query, key = turn(query, positions), turn(key, positions)
    out = weights.get("out_bias", 0)
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.kv_heads)
        scores = query[:, head] @ key[:, shared].T * config.attention_scale
        scores = scores if bias is None else scores + bias[:, :, head]
        scores = np.where(mask, np.exp(scores), 0)
        out = out + (scores / scores.sum(-1, keepdims=True)) @ value[:, shared] @ weights["out"][head]
    return out


def stack(config, params, x, mask, inputs=None):
    """Hidden states `[L, D]` of one unpacked example; `inputs` are an encoder's hidden states."""
    positions = np.arange(len(x))
    bias = None
    if config.position == "learned":
        x = x + params["positions"]["embedding"][positions]
    if config.position == "relative":
        buckets = np.asarray(relative_position_bucket(positions - positions[:, None], bidirectional=True))
        bias = params["relative_bias"]["embedding"][buckets]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023  (used at once)
        mlp = block["mlp"]
        y = norm(config, x, block["attention_norm"])
        x = x + attend(config, block["attention"], y, y, mask, bias, positions)
        if inputs is not None:
            y = norm(config, x, block["cross_attention_norm"])
            x = x + attend(config, block["cross_attention"], y, inputs, True)
        y = norm(config, x, block["mlp_norm"])
        hidden = GATES[config.activation](product("ld,dm->lm", y, mlp, "wi_0"))
        if config.gated:
            hidden = hidden * product("ld,dm->lm", y, mlp, "wi_1")
        x = x + product("lm,md->ld", hidden, mlp, "wo")
    return norm(config, x, params["final_norm"])


def transformer(config, params, tokens, mask, inputs=None):
    """Logits `[L, V]` of one unpacked example in float64; `inputs` are the encoder's tokens."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    if inputs is not None:
        inputs = stack(config, params["encoder"], params["embedding"][inputs], True)
    x = stack(config, params["decoder"], params["embedding"][tokens], mask, inputs)
    if config.tie_embeddings:
        return x @ params["embedding"].T * config.readout_scale
    return x @ params["head"]
