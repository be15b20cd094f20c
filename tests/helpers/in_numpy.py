"""SDAR in plain numpy, float64: its forward pass over exported tensors, and its loop, from the format's description.

Dense and with experts.
"""

import numpy as np


def rms_norm(x, weight, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def rotate(x, base):
    """Rotary positions of `[L, heads, D]`, halves of a head as pairs."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    cos, sin = (np.concatenate([f(angles)] * 2, axis=-1)[:, None] for f in (np.cos, np.sin))
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin


def swiglu(tensors, name, x):
    gate, up = (x @ tensors[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
    return (gate / (1 + np.exp(-gate)) * up) @ tensors[f"{name}.down_proj.weight"].T


def mixture(config, layer, x):
    """Qwen3's mixture of experts, token by token."""
    logits = x @ layer["mlp.gate.weight"].T
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for token, share in enumerate(shares):
        chosen = np.argsort(-share, kind="stable")[: config["num_experts_per_tok"]]
        for expert in chosen:
            factor = share[expert] / (share[chosen].sum() if config["norm_topk_prob"] else 1)
            out[token] += factor * swiglu(layer, f"mlp.experts.{expert}", x[token])
    return out


def sdar_logits(config, tensors, tokens):
    """Logits `[L, V]` of a row `[L]`: each token sees its block and those before, counted from the row's beginning."""
    width, eps = config["head_dim"], config["rms_norm_eps"]
    block = np.arange(len(tokens)) // config["block_size"]
    hidden_from = block[None, :] > block[:, None]
    x = tensors["model.embed_tokens.weight"][tokens]
    for number in range(config["num_hidden_layers"]):
        layer = {n.split(f"layers.{number}.")[1]: t for n, t in tensors.items() if f"layers.{number}." in n}
        y = rms_norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = ((y @ layer[f"self_attn.{n}_proj.weight"].T).reshape(len(y), -1, width) for n in "qkv")
        q, k = (rotate(rms_norm(z, layer[f"self_attn.{n}_norm.weight"], eps), config["rope_theta"])
                for z, n in ((q, "q"), (k, "k")))  # fmt: skip
        k, v = (np.repeat(z, q.shape[1] // k.shape[1], axis=1) for z in (k, v))
        scores = np.where(hidden_from, -np.inf, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1) @ layer["self_attn.o_proj.weight"].T
        y = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        x = x + (mixture(config, layer, y) if "mlp.gate.weight" in layer else swiglu(layer, "mlp", y))
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    return x @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T


def sdar_text(config, tensors, prompt, length, steps, threshold=None):
    """The tokens written behind a prompt, up to the end of a text: low_confidence_static, or dynamic with a threshold.

    The choice is among what is masked; theirs may overwrite what is not, where it is to choose more than are left.
    """
    size, mask, given = config["block_size"], config["mask_token_id"], len(prompt)
    ends = (config["eos_token_id"], config["pad_token_id"])
    canvas = np.full(-(-(given + length) // size) * size, mask)
    canvas[:given] = prompt
    counts = [size // steps + (step < size % steps) for step in range(steps)]
    for start in range(given // size * size, len(canvas), size):
        here = slice(start, start + size)
        for step in range(steps):
            masked = canvas[here] == mask
            if not masked.any():
                break
            logits = sdar_logits(config, tensors, canvas[: start + size])[here]
            tokens = logits.argmax(-1)
            sure = 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
            sure = np.where(masked, sure, -np.inf)
            chosen = np.zeros(size, bool)
            chosen[np.argsort(-sure, kind="stable")[: counts[step]]] = True
            if threshold is not None and (sure > threshold).sum() >= counts[step]:
                chosen = sure > threshold
            canvas[here] = np.where(chosen & masked, tokens, canvas[here])
        if np.isin(canvas[max(given, start) : start + size], ends).any():
            break
    written = canvas[given : given + length].tolist()
    places = [place for place, token in enumerate(written) if token in ends]
    return written[: places[0] + 1] if places else written
