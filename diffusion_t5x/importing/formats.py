"""The formats that an export writes: what each can represent, its config.json, and its settings for generation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_t5x.checkpointing.rebuilding import model_config
from diffusion_t5x.checkpointing.record import Record, is_plain
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import families
from diffusion_t5x.importing.huggingface import Folder, Tensor
from diffusion_t5x.importing.published import SETTINGS
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.masks import BlocksFrom
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.training.agreement import describe_other, other_settings

AUTO, CAUSAL, DIFFUSION = "auto", "causal", "diffusion"


@dataclasses.dataclass(frozen=True)
class Format:
    """A published format of diffusion models.

    Attributes:
      architecture: of the published code, which also is the class's name.
      code: file and class prefix that `auto_map` names.
      body: the family of autoregressive models that it is one of.
      modes: `(attention, blocks_from)` of the models that it can represent.
      shifted: a hidden state predicts the next slot's token.
    """

    architecture: str
    code: str
    body: str
    modes: tuple[tuple[str, BlocksFrom], ...]
    shifted: bool = False


_BLOCKS: tuple[str, BlocksFrom] = ("block_causal", "targets")
_WHOLE: tuple[str, BlocksFrom] = ("bidirectional", "targets")
FORMATS = {
    "sdar": Format("SDARForCausalLM", "sdar.SDAR", "qwen3", (("block_causal", "row"),)),
    "a2d-qwen3": Format("A2DQwen3LMHeadModel", "qwen3.A2DQwen3", "qwen3", (_BLOCKS, _WHOLE)),
    "a2d-qwen2": Format("A2DQwen2LMHeadModel", "qwen2.A2DQwen2", "qwen2", (_BLOCKS, _WHOLE)),
    "a2d-llama": Format("A2DLlamaLMHeadModel", "llama.A2DLlama", "llama", (_BLOCKS, _WHOLE)),
    "Dream": Format("DreamModel", "dream.Dream", "qwen2", (_WHOLE,), shifted=True),
    "llada": Format("LLaDAModelLM", "llada.LLaDA", "llama", (_WHOLE,)),
    "sdar_moe": Format("SDARMoeForCausalLM", "sdar_moe.SDARMoe", "qwen3_moe", (("block_causal", "row"),)),
    "llada_moe": Format("LLaDAMoEModelLM", "lladamoe.LLaDA", "llada_moe", (_WHOLE,)),
    "llada2_moe": Format("LLaDA2MoeModelLM", "llada2_moe.LLaDA2Moe", "llada2_moe", (("block_causal", "row"),)),
    "llada21_moe": Format("LLaDA2MoeModelLM", "llada2_moe.LLaDA2Moe", "llada2_moe", (("block_causal", "row"),)),
}
_CAUSAL = {
    "qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
_OWN_NAMES = ("llada", "llada_moe", "llada2_moe", "llada21_moe")  # of tensors, which no autoregressive format has
_SDAR = ("sdar", "sdar_moe")


def chosen(asked: str, record: Record, kind: str, where: str) -> str:
    """The format's name, or "causal".

    Args:
      asked: a name of FORMATS, "causal", or "auto": the first that fits.
      record: of the model.
      kind: `model_type` of the folder that it was imported from.
      where: the checkpoint, for messages.

    Raises:
      UserError: the format does not fit, or none does.
    """
    mode = _of_diffusion(record)
    if asked != CAUSAL and record.lora and record.lora.get("drafts_only"):
        raise UserError(
            f"{where} has draft parameters, which no format can store; without them it is the original model: "
            "--as causal writes that."
        )
    if asked == CAUSAL or (asked == AUTO and mode is None):
        if kind in _OWN_NAMES:
            raise UserError(f"{where} has {kind}'s names, which no autoregressive format has: --as {kind}.")
        return CAUSAL
    if asked == AUTO:
        names = sorted(FORMATS, key=lambda name: name != kind)
        if fitting := [name for name in names if not _why_not(name, record, mode, kind)]:
            return fitting[0]
        return DIFFUSION
    if asked == DIFFUSION and mode:
        return DIFFUSION
    if why := _why_not(asked, record, mode, kind):
        raise UserError(f"{where} cannot be written as {asked}: {why}. --as auto chooses the format.")
    return asked


def _why_not(name: str, record: Record, mode: Mode | None, kind: str) -> str:
    """Returns why a format cannot represent a model; empty if it can."""
    if name == DIFFUSION:
        return "the model is trained for no diffusion"
    form = FORMATS[name]
    if name != kind and _body(kind) != form.body:
        return f"its layers are {form.body}'s, and this model was imported as {kind}"
    if mode is None:
        return "the model is trained for no diffusion"
    if mode.noise != "mask":
        return "it holds models of masked tokens, and this one is of random tokens"
    if (mode.attention, mode.blocks_from) not in form.modes:
        size = {"block_causal": mode.block_size or 4, "bidirectional": None}
        holds = " or ".join(str(Mode(each, size[each], "mask", origin)) for each, origin in form.modes)
        return f"it holds models of {holds}, and this one is of {mode}"
    if bool(record.shifted) != form.shifted:
        return f"its models are {'' if form.shifted else 'not '}shifted (ModelConfig.shifted = {form.shifted})"
    if form.shifted and record.model.get("reads_start", True):
        return "its models read no start token before a row (ModelConfig.reads_start = False)"
    return ""


def _body(kind: str) -> str:
    """The family whose keys and names a folder of this `model_type` has."""
    return FORMATS[kind].body if kind in FORMATS and kind != "llada" else kind


def target(name: str, source: Folder, record: Record, tied: bool, dtype: str | None) -> Folder:
    """The folder to write: its config.json, and the names, shapes and dtypes of its tensors.

    Args:
      name: what `chosen` returned.
      source: the folder that the model was imported from.
      record: of the model.
      tied: the embedding reads the logits out.
      dtype: of all tensors, a key of `huggingface.DTYPES`; None keeps those of the source.

    Raises:
      UserError: the format cannot say all of the model.
    """
    kind, described = families.kind_of(source.config), families.describe(source, tied)
    rows, layers = described.vocab_size, described.config.num_layers
    if name != CAUSAL and int(record.vocabulary["mask_id"]) >= rows:
        rows = int(record.model["vocab_size"])
    if name == kind or (name not in FORMATS and kind not in FORMATS):
        config = source.config | ({"vocab_size": rows} if rows != described.vocab_size else {})
        config |= _blocks(record) if name in FORMATS else {}
    else:
        config = _config(name, source, record, rows)
    if name == DIFFUSION:
        config |= {"mask_token_id": int(record.vocabulary["mask_id"]), SETTINGS: _settings(record)}
    theirs = {weight.ours: weight for weight in described.weights}
    tensors = {}
    becomes = families.kind_of(config)
    for weight in families.FAMILIES[becomes].weights(described.config):
        names = zip(theirs[weight.ours].names(layers), weight.names(layers), strict=True)
        for there, here in names if becomes != kind else ():
            tensors[here] = source.tensors[there]
    tensors = tensors or dict(source.tensors)
    family = families.FAMILIES[becomes]
    for copy_or_name, tensor in tensors.items():
        is_table = copy_or_name.removeprefix(family.base) in _tables(family)
        shape = (rows, *tensor.shape[1:]) if is_table else tensor.shape
        tensors[copy_or_name] = Tensor("", dtype or tensor.dtype, shape)
    folder = Folder(source.path, config, tensors)
    _check(folder, name, record, tied)
    return folder


def _check(folder: Folder, name: str, record: Record, tied: bool) -> None:
    """Raises a UserError where an import of the folder would be another model."""
    if name not in FORMATS:
        return
    found = families.describe(folder, tied).config
    kept = {field: record.model[field] for field in ("reads_start", "max_length") if field in record.model}
    if other := other_settings(record.model, dataclasses.replace(found, **kept)):
        raise UserError(f"{name} cannot hold this model. {describe_other(other)}")


def _tables(family: families.Family) -> set[str]:
    """Names, without the family's prefix, of the tensors with a row for each id."""
    copies = {copy for copy, name in family.copies.items() if name == family.embedding}
    return {name.removeprefix(family.base) for name in {family.embedding, family.head} | copies}


def _settings(record: Record) -> dict[str, Any]:
    """The key of config.json for a diffusion model in the layout of the autoregressive one."""
    described = {"objective": record.objective, "decoder": record.decoder}
    kept = {name: value for name, value in described.items() if value and is_plain(value)}
    return {"shifted": bool(record.shifted), "reads_start": record.model.get("reads_start", True), **kept}


def _of_diffusion(record: Record) -> Mode | None:
    """Returns the mode in which other programs use the model for diffusion; they have no holes of unknown length."""
    return next((mode for mode in record.modes if mode.noise not in (None, "resize")), None)


def _blocks(record: Record) -> dict[str, Any]:
    """Keys on blocks and MASK."""
    mode = _of_diffusion(record)
    blocks = {"block_size": mode.block_size} if mode and mode.block_size else {}
    return {"mask_token_id": int(record.vocabulary["mask_id"]), **blocks}


def _config(name: str, source: Folder, record: Record, rows: int) -> dict[str, Any]:
    """A config.json made from that of the source, whose keys stay where they mean the same."""
    dropped = ("auto_map", "architectures", "block_size", "mask_token_id")
    said = {key: value for key, value in source.config.items() if key not in dropped}
    model, kind = model_config(record, str(source.path)), families.kind_of(source.config)
    rope = said.pop("rope_parameters", None) or {}
    said = {"rope_theta": rope.get("rope_theta", model.rotary_base), "rope_scaling": None} | said
    if rope.get("rope_type", "default") != "default":
        said["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if name not in FORMATS:
        body = _body(kind)
        return said | {"model_type": body, "architectures": [_CAUSAL[body]], "vocab_size": rows}
    form = FORMATS[name]
    file, _, prefix = form.code.partition(".")
    modeling = f"modeling_{file}.{form.architecture}"
    if name.startswith("a2d"):  # configuration and model are in one file
        auto_map = {"AutoConfig": f"modeling_{file}.{prefix}Config", "AutoModelForMaskedLM": modeling}
    else:
        auto_map = {"AutoConfig": f"configuration_{file}.{prefix}Config"}
    auto_map["AutoModel"] = f"modeling_{file}.{prefix}Model" if name in _SDAR else modeling
    if name in (*_SDAR, "llada"):
        auto_map["AutoModelForCausalLM"] = modeling
    if name == "llada":
        said = _llada(said, model, rows)
    elif form.body in ("qwen3", "qwen3_moe", "llama"):
        said |= {"head_dim": model.head_dim}
    if name in _SDAR:
        said.pop("layer_types", None)
        said |= {"attention_bias": False, "fuse_cross_entropy": False, "use_cache": False}
    made = {"model_type": name, "architectures": [form.architecture], "auto_map": auto_map, "vocab_size": rows}
    return said | made | _blocks(record)


def _llada(said: Mapping[str, Any], model: ModelConfig, rows: int) -> dict[str, Any]:
    """OLMo's names. Raises a UserError for heads of another width, which they cannot say."""
    if model.head_dim * model.num_heads != model.embed_dim or model.rotary_factor != 1:
        raise UserError(
            f"llada cannot hold this model: its heads are {model.embed_dim / model.num_heads:g} wide (embed_dim / "
            f"num_heads), without rotary scaling. Here head_dim = {model.head_dim}, rotary_factor = "
            f"{model.rotary_factor}."
        )
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept = {key: said[key] for key in (*ids, "torch_dtype", "dtype", "transformers_version") if key in said}
    return kept | {
        "d_model": model.embed_dim, "n_layers": model.num_layers, "n_heads": model.num_heads,
        "n_kv_heads": model.kv_heads, "mlp_hidden_size": model.mlp_dim, "vocab_size": rows, "embedding_size": rows,
        "rms_norm_eps": model.norm_epsilon, "rope": True, "rope_theta": model.rotary_base, "rope_full_precision": True,
        "max_sequence_length": model.max_length, "block_type": "llama", "block_group_size": 1,
        "activation_type": "silu", "layer_norm_type": "rms", "layer_norm_with_affine": True, "alibi": False,
        "weight_tying": model.tie_embeddings, "include_bias": False, "include_qkv_bias": False, "scale_logits": False,
        "input_emb_norm": False, "attention_layer_norm": False, "bias_for_layer_norm": False,
    }  # fmt: skip
