"""Settings of a mixture of experts."""

import dataclasses
from typing import Literal

from diffusion_t5x.errors import UserError, check_choices


@dataclasses.dataclass(frozen=True)
class Experts:
    """Replaces the feed-forward layer by a mixture of experts: each token is read by the few that a router chooses.

    Experts are gated and have no biases and no dropout inside.

    Attributes:
      number: experts in a layer.
      per_token: experts that read a token.
      mlp_dim: inner size of an expert.
      shared_mlp_dim: inner size of the shared experts together, which read every token; 0: there are none.
      dense_layers: the first layers, which keep a feed-forward layer of `ModelConfig.mlp_dim`.
      scores: a token's scores are the "softmax" or the "sigmoid" of its products with the router, in float32. The
        experts of the highest scores are chosen, and their scores are the factors on what they return.
      normalize: divide the factors of a token by their sum.
      scale: factor on all factors.
      groups: number of groups of consecutive experts. `groups_per_token` of them are open to a token: those
        with the highest sum of their two best scores (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
      groups_per_token: see `groups`.
      selection_bias: each expert has a bias that is added to its scores when experts are chosen, and never to the
        factors (arXiv 2408.15664). It has no gradient: `bias_rate` alone changes it.
      bias_rate: after each training step, the bias of an expert with less than the mean load grows by this number,
        and that of one with more shrinks by it: loss-free balancing. DeepSeek-V3 takes 0.001. 0 leaves the biases.
      balance_weight: factor of the balance loss, see `mixture.balance`, in the minimised loss. 0 only logs it.
      capacity_factor: where devices exchange tokens (`MeshConfig.expert`), the most that one sends to another, as a
        multiple of what it would send if all experts were used evenly. Choices beyond it, those with the smallest
        factors, are dropped: the expert adds nothing to such a token. None drops none, and makes room for all.
    """

    number: int
    per_token: int
    mlp_dim: int
    shared_mlp_dim: int = 0
    dense_layers: int = 0
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    selection_bias: bool = False
    bias_rate: float = 0.0
    balance_weight: float = 0.0
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("number", "per_token", "mlp_dim", "groups", "groups_per_token"):
            if getattr(self, name) < 1:
                raise UserError(f"Experts.{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("shared_mlp_dim", "dense_layers", "bias_rate", "balance_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"Experts.{name} must be at least 0, not {getattr(self, name)}.")
        if self.bias_rate and not self.selection_bias:
            raise UserError(f"Experts.bias_rate = {self.bias_rate} changes biases: set Experts.selection_bias = True.")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise UserError(
                f"Experts.capacity_factor must be above 0, or None to drop no choice; not {self.capacity_factor}."
            )
        if self.number % self.groups or self.groups_per_token > self.groups:
            raise UserError(
                f"Experts.number = {self.number} must be a multiple of groups = {self.groups}, and groups_per_token = "
                f"{self.groups_per_token} at most groups."
            )
        if self.per_token > (open_to_one := self.number // self.groups * self.groups_per_token):
            raise UserError(
                f"Experts.per_token = {self.per_token} is more than the {open_to_one} experts available to a token."
            )
