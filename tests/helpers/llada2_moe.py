"""LLaDA2's mixture of experts in plain jax.numpy, for decoders that call a model over a cache.

Its cache holds the tokens: each pass reads the whole rows again, as the published code does.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.attention import write_rows
from diffusion_t5x.models.config import ModelConfig


class Llada2Moe:
    """The model in a folder; its hidden states are logits."""

    def __init__(self, folder: pathlib.Path, mask_id: int, eos_id: int):
        self.said: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")
        size = self.said["vocab_size"]
        self.config = ModelConfig(embed_dim=1, num_layers=1, num_heads=1, head_dim=1, mlp_dim=1, vocab_size=size)
        self.vocabulary = TokenIds(
            size=size, pad_id=eos_id, eos_id=eos_id, mask_id=mask_id, start_id=0, noise_ranges=(), reads_start=False
        )

    def encode(self, batch):
        return None

    def map_logits(self, fn, hidden, *per_position):
        return fn(hidden, *per_position)

    def extend(self, tokens, kind, cache, write_at, encoded):
        rows = write_rows(cache.keys[0, :, :, 0, 0], tokens.astype(jnp.float32), write_at)
        logits = self.logits(rows.astype(jnp.int32), cache.slots.positions, kind.mask(cache.slots, cache.slots))
        cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, tokens.shape[1]))
        return cut(logits, write_at), cache.replace(keys=rows[None, :, :, None, None])

    def logits(self, tokens, positions, mask):
        """Logits `[B, L, V]` of rows, where `mask[b, q, k]` says that q sees k."""
        x = jnp.asarray(self.tensors["model.word_embeddings.weight"])[tokens]
        for layer in range(self.said["num_hidden_layers"]):
            x = x + self._attention(f"{layer}.attention", self._norm(f"{layer}.input_layernorm", x), positions, mask)
            y = self._norm(f"{layer}.post_attention_layernorm", x)
            is_dense = layer < self.said["first_k_dense_replace"]
            x = x + (self._mlp(f"{layer}.mlp", y) if is_dense else self._experts(f"{layer}.mlp", y))
        return self._scaled(x, self.tensors["model.norm.weight"]) @ self.tensors["lm_head.weight"].T

    def _of(self, name):
        return self.tensors[f"model.layers.{name}.weight"]

    def _scaled(self, x, weight):
        return weight * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.said["rms_norm_eps"])

    def _norm(self, name, x):
        return self._scaled(x, self._of(name))

    def _attention(self, name, x, positions, mask):
        heads, kv_heads, size = (self.said[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        projected = (x @ self._of(f"{name}.query_key_value").T).reshape(*x.shape[:2], -1, size)
        query, key, value = jnp.split(projected, [heads, heads + kv_heads], axis=2)
        half = int(size * self.said["partial_rotary_factor"]) // 2
        angles = positions[..., None] * self.said["rope_theta"] ** (-np.arange(half) / half)
        sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]

        def turned(name, x):
            x = self._norm(name, x)
            first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

        query, key = turned(f"{name}.query_layernorm", query), turned(f"{name}.key_layernorm", key)
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
        return attended.reshape(*x.shape[:2], -1) @ self._of(f"{name}.dense").T

    def _mlp(self, name, x):
        gate, up, down = (self._of(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _experts(self, name, x):
        number, groups = self.said["num_experts"], self.said["n_group"]
        share = jax.nn.sigmoid(x @ self._of(f"{name}.gate").T)
        judged = share + self.tensors[f"model.layers.{name}.gate.expert_bias"]
        in_groups = judged.reshape(*x.shape[:2], groups, -1)
        best_two = jnp.sort(in_groups, axis=-1)[..., -2:].sum(axis=-1)
        least = jnp.sort(best_two, axis=-1)[..., -self.said["topk_group"], None]
        judged = jnp.where((best_two >= least)[..., None], in_groups, -jnp.inf).reshape(*x.shape[:2], number)
        least = jnp.sort(judged, axis=-1)[..., -self.said["num_experts_per_tok"], None]
        share = jnp.where(judged >= least, share, 0)
        share = share / (share.sum(axis=-1, keepdims=True) + 1e-20) * self.said["routed_scaling_factor"]
        each = [self._mlp(f"{name}.experts.{n}", x) * share[..., n, None] for n in range(number)]
        return sum(each) + self._mlp(f"{name}.shared_experts", x)
