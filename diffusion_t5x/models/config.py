"""Dimensions and architecture choices of a Transformer."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from diffusion_t5x.data.batch import Architecture
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.experts import Experts

Activation = Literal["gelu", "silu"]
Remat = Literal["none", "dots", "full"]
MOST_UNROLLED = 12  # layers


_MOST = 1_000_000  # layers, heads or width: larger numbers are slips, with which a dry run would not end


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a Transformer. The defaults are T5 1.1's; other choices are those of Llama-style models and GPT-2.

    Attributes:
      embed_dim, num_layers, num_heads, head_dim, mlp_dim: the size. An encoder has as many layers as its decoder.
      architecture: "decoder_only" reads inputs and targets as one sequence; "encoder_decoder" encodes the inputs, and
        every layer of its decoder attends to them as well.
      shifted: how a diffusion model is read. False: the hidden state at a slot predicts the slot's own token. True:
        it predicts the next one, as an autoregressive model's does (Dream, arXiv 2508.15487; DiffuLLaMA, 2410.17891).
        Autoregressive training and decoding read a model that way in any case.
      reads_start: the model reads the start token: an autoregressive model before the first token, a diffusion model
        before the first token of a shifted row, else in place of a first token that is MASK. False reads rows as they
        are, as models do whose tokenizer puts no BOS before a text (Qwen, SmolLM2) and published diffusion models
        (LLaDA, Dream, SDAR): only the first token of a text is predicted from the start token, by diffusion in its own
        slot.
      vocab_size: rows of the embedding; None takes the vocabulary's size, rounded up to a multiple of 128.
      num_kv_heads: key and value heads, shared by groups of query heads; None means one for each query head.
      position: "relative" is T5's learned bias shared by all layers, "rotary" rotates queries and keys, "learned" adds
        a vector for each of `max_length` positions to the embedded tokens.
      norm: "rms" scales by the root mean square, "layer" (arXiv 1607.06450) subtracts the mean first and adds a bias.
      activation: activation of the feed-forward layer.
      gated: the activation gates a second product; False uses only the activation.
      experts: a mixture of experts in place of the feed-forward layer; None: no experts. Only for decoder-only models.
      tie_embeddings: compute logits with the embedding; False adds an output matrix.
      query_key_norm: RMS-normalise queries and keys of each head.
      whole_query_key_norm: RMS-normalise queries, and keys, of all heads as one vector (OLMo 2).
      qkv_bias: add biases to queries, keys and values.
      output_bias: add biases to the outputs of attention and to the feed-forward layer.
      attention_scale: factor on query-key products. 1 with T5's initialiser, which includes the scale; `head_dim **
        -0.5` in most other models.
      logits_scale: factor on the last hidden state; None is T5's `embed_dim ** -0.5` if embeddings are tied.
      norm_epsilon: added to the mean square, or to the variance.
      norm_offset: an RMS norm's parameter is its scale minus 1, as in Gemma.
      pre_norms: normalise the inputs of attention and feed-forward layers.
      post_norms: normalise the outputs of attention and feed-forward layers before they are added to the residual.
      residual_scale: factor on these outputs when they are added to the residual.
      embedding_scale: factor on embedded tokens.
      attention_softcap, logits_softcap: x becomes `cap * tanh(x / cap)`, for query-key products and logits.
      attention_backend: the implementation of attention: "xla" anywhere, "cudnn" on NVIDIA GPUs, on TPUs "splash"
        (without a relative bias) or "flash" (with one); "auto" chooses by device and call. Any other choice that cannot
        be used is an error, except when decoding over a cache, which then uses "xla".
      local_layers: for each layer, True if it sees only tokens less than `window` away; None: no layer.
      window: window of the local layers, in tokens.
      local_rotary_base: rotary base of the local layers, whose wavelengths then are not stretched; None: the same
        wavelengths as in other layers.
      relative_buckets, relative_max_distance: number of buckets and maximum distance of the relative position bias.
      causal_buckets: a decoder's relative position bias has T5's own one-sided buckets: all of them for the past, and
        the future counts as distance 0. Ours are two-sided, for bidirectional attention; an encoder's always are.
      rotary_base: base of the rotary wavelengths.
      rotary_dim: the number of a head's first dimensions that rotary positions rotate; None: all.
      rotary_factor: factor on the rotary wavelengths ("linear" scaling).
      rotary_stretched: two wavelengths in tokens; the factor applies in full only above the second and not at all below
        the first, and frequencies are interpolated between them (Llama 3.1, arXiv 2407.21783). None stretches all.
      rotary_ramp: two indices among a head's pairs; the factor applies in full from the second on and not at all up to
        the first, and frequencies are interpolated between them (YaRN, arXiv 2309.00071). None: no ramp.
      unrotated_layers: for each layer, True if it has no rotary positions (SmolLM3); None: no layer.
      max_length: longest row that the model is meant for, and number of learned positions; None sets no limit.
      dropout_rate: dropout after the embedding, on every residual branch, inside the feed-forward layer and after the
        last norm.
      dtype: dtype of activations; parameters, softmax, logits and loss are float32.
      scan_unroll: number of layers unrolled in one iteration of the scan over layers; True unrolls all (fast on CPU) if
        there are at most MOST_UNROLLED: more would take minutes to compile.
      remat: what the backward pass recomputes: nothing ("none"), everything but matrix products ("dots"), or everything
        ("full").
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    architecture: Architecture = "decoder_only"
    shifted: bool = False
    reads_start: bool = True
    vocab_size: int | None = None
    num_kv_heads: int | None = None
    position: Literal["relative", "rotary", "learned"] = "relative"
    norm: Literal["rms", "layer"] = "rms"
    activation: Activation = "gelu"
    gated: bool = True
    experts: Experts | None = None
    tie_embeddings: bool = True
    query_key_norm: bool = False
    whole_query_key_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    attention_scale: float = 1.0
    logits_scale: float | None = None
    norm_epsilon: float = 1e-6
    norm_offset: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    attention_backend: Literal["auto", "xla", "cudnn", "splash", "flash"] = "auto"
    local_layers: tuple[bool, ...] | None = None
    window: int | None = None
    local_rotary_base: float | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    causal_buckets: bool = False
    rotary_base: float = 10_000.0
    rotary_dim: int | None = None
    rotary_factor: float = 1.0
    rotary_stretched: tuple[float, float] | None = None
    rotary_ramp: tuple[float, float] | None = None
    unrotated_layers: tuple[bool, ...] | None = None
    max_length: int | None = None
    dropout_rate: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    scan_unroll: int | bool = 1
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_layers", "num_heads", "head_dim", "mlp_dim"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise UserError(f"ModelConfig.{name} must be from 1 to {_MOST:,}, not {getattr(self, name):,}.")
        check_choices(self)
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"ModelConfig.num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.kv_heads}."
            )
        if self.position == "rotary" and self.head_dim % 2:
            raise UserError(f"Rotary positions need an even ModelConfig.head_dim, not {self.head_dim}.")
        if self.rotary_dim is not None and not (0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0):
            raise UserError(
                f"ModelConfig.rotary_dim must be even, above 0 and at most head_dim = {self.head_dim}; not "
                f"{self.rotary_dim}."
            )
        self._check_experts()
        near = self.relative_buckets // (2 if self.causal_buckets else 4)  # distances with a bucket of their own
        if self.position == "relative" and not 0 < near < self.relative_max_distance:
            raise UserError(
                f"ModelConfig.relative_max_distance = {self.relative_max_distance} must be above the {near} distances "
                f"that have buckets of their own among relative_buckets = {self.relative_buckets}, at least 1."
            )
        if self.position == "learned" and not self.max_length:
            raise UserError(f"Learned positions need a ModelConfig.max_length of at least 1, not {self.max_length}.")
        if self.norm == "layer" and self.norm_offset:
            raise UserError('ModelConfig.norm_offset needs norm = "rms".')
        if self.local_layers and (len(self.local_layers) != self.num_layers or not self.window):
            raise UserError(
                f"ModelConfig.local_layers must say of each of {self.num_layers} layers if it is local, and not of "
                f"{len(self.local_layers)}; and local layers need a ModelConfig.window, not {self.window}."
            )
        if self.unrotated_layers and (len(self.unrotated_layers) != self.num_layers or self.position != "rotary"):
            raise UserError(
                f"ModelConfig.unrotated_layers must say of each of {self.num_layers} layers with rotary positions if "
                f"it has none, and not of {len(self.unrotated_layers)}."
            )
        if self.rotary_ramp is not None and self.rotary_stretched is not None:
            raise UserError("ModelConfig.rotary_ramp and rotary_stretched exclude each other: set one to None.")
        shortest, longest = self.rotary_stretched or (1, 2)
        if self.rotary_factor <= 0 or not 0 < shortest < longest:
            raise UserError(
                "ModelConfig.rotary_factor must be positive, and rotary_stretched None or two ascending positive "
                f"wavelengths; not {self.rotary_factor} and {self.rotary_stretched}."
            )
        for name in ("rotary_base", "local_rotary_base"):
            if (base := getattr(self, name)) is not None and base <= 0:
                raise UserError(f"ModelConfig.{name} must be above 0, not {base}.")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"ModelConfig.dropout_rate must lie in [0, 1), not {self.dropout_rate}.")

    def _check_experts(self) -> None:
        if isinstance(self.experts, Mapping):  # as a checkpoint's record has them
            object.__setattr__(self, "experts", Experts(**self.experts))
        if self.experts is None:
            return
        if self.architecture != "decoder_only" or not self.gated or self.output_bias:
            raise UserError(
                'ModelConfig.experts need architecture = "decoder_only", gated = True and output_bias = False; not '
                f"{self.architecture!r}, {self.gated} and {self.output_bias}."
            )
        if self.experts.dense_layers >= self.num_layers:
            raise UserError(
                f"Experts.dense_layers = {self.experts.dense_layers} must be below ModelConfig.num_layers = "
                f"{self.num_layers}. Without experts, set ModelConfig.experts = None."
            )

    @property
    def dense_layers(self) -> int:
        """Number of first layers without experts in a model whose other layers have them; otherwise 0."""
        return 0 if self.experts is None else self.experts.dense_layers

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a head that rotary positions rotate."""
        return self.rotary_dim or self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def layers_unrolled(self) -> int:
        """Layers unrolled in one iteration of the scan over layers."""
        if self.scan_unroll is True:
            return self.num_layers if self.num_layers <= MOST_UNROLLED else 1
        return self.scan_unroll or 1

    @property
    def readout_scale(self) -> float:
        if self.logits_scale is not None:
            return self.logits_scale
        return self.embed_dim**-0.5 if self.tie_embeddings else 1.0

    @property
    def num_embeddings(self) -> int:
        """Number of rows in the embedding; known once the config is one `with_vocabulary`."""
        assert self.vocab_size is not None
        return self.vocab_size

    def with_vocabulary(self, size: int) -> "ModelConfig":
        """Returns the config with an embedding row for each of `size` ids.

        Raises:
          UserError: `vocab_size` was set and is too small.
        """
        if self.vocab_size is None:
            return dataclasses.replace(self, vocab_size=-(-size // 128) * 128)
        if self.vocab_size < size:
            raise UserError(
                f"ModelConfig.vocab_size = {self.vocab_size} is too small: the task's vocabulary has {size} ids "
                f"(MASK included). Set it to at least {size}, or to None to take the vocabulary's size."
            )
        return self

    def check_length(self, length: int, what: str = "TASK_FEATURE_LENGTHS") -> None:
        """Raises a UserError when rows of `length` tokens do not fit the model."""
        if self.max_length is not None and length > self.max_length:
            raise UserError(
                f"Features too long for the model: {what} makes rows of {length} tokens, and "
                f"ModelConfig.max_length is {self.max_length}. Shorten the features or raise max_length."
            )
