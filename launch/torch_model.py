"""The model of `models/decoder_only.gin` written by hand in PyTorch, to compare training speed with.

T5 1.1's layers: RMS norms, attention with one table of relative biases for all layers, gated GELU, tied embeddings.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.positions import relative_position_bucket


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        embed, inner = config.embed_dim, config.num_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(embed, eps=config.norm_epsilon)
        self.query, self.key, self.value = (nn.Linear(embed, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, embed, bias=False)
        self.mlp_norm = nn.RMSNorm(embed, eps=config.norm_epsilon)
        self.wi_0, self.wi_1 = (nn.Linear(embed, config.mlp_dim, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.mlp_dim, embed, bias=False)
        self.num_heads = config.num_heads

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = self.attention_norm(x)
        heads = (
            each(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(*heads, attn_mask=bias, scale=1.0)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.wo(F.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y))


class Transformer(nn.Module):
    """The model, autoregressive and causal.

    Args:
      config: a decoder-only model with relative positions and tied embeddings.
      length: length of the rows.
    """

    def __init__(self, config: ModelConfig, length: int):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.relative_bias = nn.Embedding(config.relative_buckets, config.num_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_epsilon)
        self.readout_scale = config.readout_scale
        places = np.arange(length)
        buckets = relative_position_bucket(
            places - places[:, None],
            bidirectional=True,
            num_buckets=config.relative_buckets,
            max_distance=config.relative_max_distance,
        )
        self.register_buffer("buckets", torch.from_numpy(np.array(buckets, np.int64)))
        self.register_buffer("future", torch.ones(length, length, dtype=torch.bool).triu(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, L, V]` of inputs `[B, L]`."""
        bias = self.relative_bias(self.buckets).permute(2, 0, 1).masked_fill(self.future, -torch.inf)[None]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, bias)
        return F.linear(self.final_norm(x) * self.readout_scale, self.embedding.weight)

    @torch.no_grad()
    def load(self, params: Mapping) -> None:
        """Loads the parameters of our model, a nested dictionary of arrays."""
        self._copy(self.embedding.weight, params["embedding"])
        decoder = params["decoder"]
        self._copy(self.relative_bias.weight, decoder["relative_bias"]["embedding"])
        self._copy(self.final_norm.weight, decoder["final_norm"]["scale"])
        for number, block in enumerate(self.blocks):
            theirs = {name: {leaf: x[number] for leaf, x in group.items()} for name, group in decoder["blocks"].items()}
            for norm in ("attention_norm", "mlp_norm"):
                self._copy(getattr(block, norm).weight, theirs[norm]["scale"])
            for name, kernel in (theirs["attention"] | theirs["mlp"]).items():
                linear = getattr(block, name).weight
                self._copy(linear, np.asarray(kernel).reshape(linear.shape[1], linear.shape[0]).T)

    @staticmethod
    def _copy(parameter: torch.Tensor, values: np.ndarray) -> None:
        parameter.copy_(torch.from_numpy(np.array(values)))
