"""The settings and tensor names of a GGUF file, as those of Hugging Face's format.

Names of keys and tensors are those of llama.cpp's `gguf-py/gguf/constants.py`; how tensors are changed on the way into
a GGUF file is what its `convert_hf_to_gguf.py` does.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_t5x.errors import UserError, did_you_mean

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ROTARY_FACTORS = "rope_freqs.weight"
_TABLES = {"token_embd.weight": EMBEDDING, "output.weight": HEAD, "output_norm.weight": "model.norm.weight"}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORM = {"ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Keys after the architecture's name.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_GEMMA_KEYS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA3_KEYS = _GEMMA_KEYS | {
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base_swa": "rope_local_base_freq",
}
# Of `rope_scaling`, by its type; `finetuned` says what was done to the model.
_SCALING = {
    "none": {},
    "linear": {"rope.scaling.factor": "factor"},
    "yarn": {
        "rope.scaling.factor": "factor",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    },
}
# How Llama 3.1 and later stretch rotary wavelengths, but for the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """GGUF's storage of the models of one `general.architecture`.

    Attributes:
      model_type: in Hugging Face's format.
      norms: names of a layer's norms in addition to those that all have.
      keys: names of keys in addition to those that all have.
      permuted: the rows of query and key matrices have another order.
      norm_offset: the weights of norms are 1 more than in Hugging Face's format.
      settings: settings in config.json that are the same in all models.
      largest: number of layers of the one size whose attention scale is by `hidden_size / num_attention_heads`, not by
        `head_dim` (27B).
    """

    model_type: str
    norms: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NORM)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    permuted: bool = False
    norm_offset: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"hidden_act": "silu"})
    largest: int = 0


_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_LOCAL = {"rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6}
ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=True, settings={"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": Architecture("gemma2", _FOUR_NORMS, _GEMMA_KEYS, norm_offset=True, settings=_GELU, largest=46),
    "gemma3": Architecture(
        "gemma3_text", _FOUR_NORMS, _GEMMA3_KEYS, norm_offset=True, settings=_GELU | _LOCAL, largest=62
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of Hugging Face's tensors in a GGUF file.

    Attributes:
      architecture: a key of ARCHITECTURES.
      heads, kv_heads: of queries and keys, for the order of their rows.
    """

    architecture: str
    heads: int = 1
    kv_heads: int = 1

    def name(self, stored: str) -> str:
        """The name in Hugging Face's format; a tensor that is not known keeps its own."""
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored):
            layer, part, kind = match.groups()
            part = (_PARTS | dict(ARCHITECTURES[self.architecture].norms)).get(part, "")
            return f"model.layers.{layer}.{part}.{kind}" if part else stored
        return _TABLES.get(stored, stored)

    def rows(self, name: str, count: int) -> np.ndarray:
        """Returns the index of the file's row for each row of a tensor, int `[rows]`.

        llama.cpp rotates neighbours where Hugging Face's format rotates the halves of a head, so the rows of each
        query and key head come as first of one half, first of the other, second of one half, ...
        """
        rows = np.arange(count)
        heads = {"q_proj.weight": self.heads, "k_proj.weight": self.kv_heads}.get(".".join(name.split(".")[-2:]))
        if heads is None or not ARCHITECTURES[self.architecture].permuted:
            return rows
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).ravel()

    def values(self, name: str, stored: np.ndarray) -> np.ndarray:
        """Numbers in Hugging Face's format, from those that are stored."""
        if ARCHITECTURES[self.architecture].norm_offset and name.endswith("norm.weight"):
            return stored - np.float32(1)
        return stored


def drop_keys(values: dict[str, Any], ignored: Sequence[str], where: str) -> None:
    """Removes metadata keys from `values`. Raises a UserError if one is missing."""
    for name in ignored:
        if name not in values:
            raise UserError(f"--ignore_keys: {where} has no key {name!r}.{did_you_mean(name, values)}")
        del values[name]


def layout(values: Mapping[str, Any], where: str) -> Layout:
    """The layout of a file with this metadata. Raises a UserError for an unsupported architecture."""
    name = values.get("general.architecture")
    if name not in ARCHITECTURES:
        only = f"only {', '.join(ARCHITECTURES)}.{did_you_mean(str(name), ARCHITECTURES)}"
        raise UserError(f"{where}: general.architecture = {name!r} is not supported, {only}")
    heads = _number(values, f"{name}.attention.head_count", where)
    kv_heads = f"{name}.attention.head_count_kv"
    return Layout(name, heads, _number(values, kv_heads, where) if kv_heads in values else heads)


def config(
    values: Mapping[str, Any], where: str, rows: int, tied: bool, rotary_factors: np.ndarray | None
) -> dict[str, Any]:
    """The config.json of a model with this metadata.

    Args:
      values: the file's metadata.
      where: the file, for messages.
      rows: of the embedding.
      tied: the file has no output matrix.
      rotary_factors: float32 `[head_dim / 2]`, by how much each rotary wavelength is stretched; None: it is not.

    Raises:
      UserError: a key under the architecture's name that is missing, or not known here.
    """
    name = values["general.architecture"]
    architecture = ARCHITECTURES[name]
    said = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
    keys = _KEYS | dict(architecture.keys)
    found = {keys[key]: _plain(value) for key, value in said.items() if key in keys}
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        if key not in found:
            missing = next(theirs for theirs, ours in keys.items() if ours == key)
            raise UserError(f"{where} lacks the key {name}.{missing}.")
    heads = found["hidden_size"] // found["num_attention_heads"]
    head_dim = found.setdefault("head_dim", said.get("rope.dimension_count", heads))
    # What has one value alone that is computed as here.
    only = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "attention.causal": True}
    scaling = said.get("rope.scaling.type", "none")
    only |= {"rope.scaling.type": scaling if scaling in _SCALING else ", ".join(_SCALING)}
    of_scaling = _SCALING.get(scaling, {})
    _refuse(said, {*keys, *of_scaling, "vocab_size", "rope.scaling.finetuned"}, only, name, where)
    if architecture.largest:
        found["query_pre_attn_scalar"] = heads if found["num_hidden_layers"] == architecture.largest else head_dim
    if scaling != "none":
        given = {ours: _plain(said[key]) for key, ours in of_scaling.items() if key in said}
        found["rope_scaling"] = {"rope_type": scaling, "factor": 1.0} | given
    if rotary_factors is not None:
        found["rope_scaling"] = _llama3(rotary_factors, head_dim, found.get("rope_theta", 10_000.0), where)
    return {
        "model_type": architecture.model_type,
        **architecture.settings,
        **found,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }


def _refuse(said: Mapping[str, Any], known: set[str], only: Mapping[str, Any], architecture: str, where: str) -> None:
    """Raises a UserError for a key that may change what the model computes."""
    for key, value in said.items():
        if key in only and value != only[key]:
            raise UserError(f"{where}: {architecture}.{key} = {value!r} is not supported, only {only[key]!r}.")
        if key not in known and key not in only:
            raise UserError(
                f"{where}: the key {architecture}.{key} = {str(value)[:60]} is not known here, and may change what the "
                f"model computes. To import the model as if it were not there: --ignore_keys={architecture}.{key}."
            )


def _llama3(factors: np.ndarray, head_dim: int, base: float, where: str) -> dict[str, Any]:
    """The `rope_scaling` that makes these factors. Raises a UserError if Llama 3's does not."""
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    factor = float(factors.max())
    low, high, length = _LLAMA3.values()
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    if factors.shape != wavelengths.shape or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise UserError(f"{where}: {ROTARY_FACTORS} stretches rotary wavelengths differently from Llama 3.")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _number(values: Mapping[str, Any], key: str, where: str) -> int:
    if not isinstance(value := values.get(key), int) or value < 1:
        raise UserError(f"{where}: {key} = {str(value)[:60]} should be a positive whole number.")
    return value


def _plain(value: Any) -> Any:
    """A float32 with the digits that it takes: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
