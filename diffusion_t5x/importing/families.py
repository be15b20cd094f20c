"""The model families that can be imported, by the `model_type` of their config.json."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.importing import (  # fmt: skip
    a2d,
    dream,
    gemma,
    gemma2,
    gemma3_text,
    gpt2,
    granite,
    llada,
    llada2_moe,
    llada_moe,
    llama,
    mistral,
    mixtral,
    mt5,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    sdar,
    sdar_moe,
    smollm3,
    t5,
)
from diffusion_t5x.importing.huggingface import CONFIG, Folder
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.published import SETTINGS, Published, recorded
from diffusion_t5x.importing.weights import VOCABULARY_AXIS, Source, Weight
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition


@dataclasses.dataclass(frozen=True)
class Family:
    """Layout of the models of one `model_type`; the defaults are those of Llama.

    Attributes:
      config: builds the ModelConfig; True if the embedding also computes the logits.
      weights: maps parameters to tensors.
      tokenizers: tokenizer files beside the usual ones.
      embedding, head: names of these tensors.
      tied: what `tie_word_embeddings` is where a config.json does not say.
      copies: names of tensors that duplicate another, and of that one.
      base: a prefix of names that files may lack.
      aliases: other names of keys of the config.json.
      vocab_size: rows of the embedding.
      published: of diffusion models: how they were trained and are decoded.
    """

    config: Callable[[Keys, bool], ModelConfig]
    weights: Callable[[ModelConfig], tuple[Weight, ...]]
    tokenizers: tuple[str, ...] = ()
    embedding: str = llama.EMBEDDING
    head: str = llama.HEAD
    tied: bool = False
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base: str = ""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    vocab_size: Callable[[Keys], int] = lambda keys: keys.get("vocab_size")
    published: Callable[[Keys], Published] | None = None


def _a2d(base: Family) -> Family:
    """Returns the family of the diffusion models that dllm made from models of another."""
    return dataclasses.replace(base, config=functools.partial(a2d.config, base.config), published=a2d.published)


_MERGES = ("merges.txt",)
_LLAMA = Family(llama.config, llama.weights)
_QWEN2 = Family(qwen2.config, qwen2.weights, _MERGES)
_QWEN3 = Family(qwen3.config, qwen3.weights, _MERGES)
_QWEN3_MOE = Family(qwen3_moe.config, qwen3_moe.weights, _MERGES, aliases=qwen3_moe.ALIASES)
_LLADA2_MOE = Family(
    llada2_moe.config, llada2_moe.weights, embedding=llada2_moe.EMBEDDING, published=llada2_moe.published
)
_T5 = Family(
    t5.config, t5.weights, embedding=t5.EMBEDDING, head=t5.HEAD, tied=True, copies=t5.COPIES, aliases=t5.ALIASES
)
FAMILIES = {
    "Dream": Family(dream.config, qwen2.weights, _MERGES, published=dream.published),
    "a2d-llama": _a2d(_LLAMA),
    "a2d-qwen2": _a2d(_QWEN2),
    "a2d-qwen3": _a2d(_QWEN3),
    "gemma": Family(gemma.config, llama.weights, tied=True),
    "gemma2": Family(gemma2.config, gemma2.weights, tied=True),
    "gemma3_text": Family(gemma3_text.config, gemma3_text.weights, tied=True),
    "gpt2": Family(
        gpt2.config,
        gpt2.weights,
        embedding=gpt2.EMBEDDING,
        head=gpt2.HEAD,
        tied=True,
        base="transformer.",
        aliases=gpt2.ALIASES,
    ),
    "granite": Family(granite.config, llama.weights),
    "llada": Family(
        llada.config,
        llada.weights,
        embedding=llada.EMBEDDING,
        head=llada.HEAD,
        aliases=llada.ALIASES,
        vocab_size=llada.vocab_size,
        published=llada.published,
    ),
    "llada2_moe": _LLADA2_MOE,
    "llada21_moe": dataclasses.replace(_LLADA2_MOE, published=llada2_moe.published_editing),
    "llada_moe": Family(llada_moe.config, llada_moe.weights, published=llada.published),
    "llama": _LLAMA,
    "mistral": Family(mistral.config, llama.weights),
    "mixtral": Family(mixtral.config, mixtral.weights, aliases=mixtral.ALIASES),
    "mt5": dataclasses.replace(_T5, config=mt5.config),
    "olmo2": Family(olmo2.config, olmo2.weights),
    "phi3": Family(phi3.config, phi3.weights),
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "sdar": Family(sdar.config, qwen3.weights, _MERGES, published=sdar.published),
    "sdar_moe": dataclasses.replace(_QWEN3_MOE, config=sdar_moe.config, published=sdar.published),
    "smollm3": Family(smollm3.config, llama.weights, tied=True),
    "t5": _T5,
}
# LLaDA-MoE has the model_type of LLaDA.
_BY_ARCHITECTURE = {"LLaDAMoEModelLM": "llada_moe"}
_COMPARED = 1 << 24  # numbers at a time


@dataclasses.dataclass(frozen=True)
class Described:
    """A source's description of its model, checked.

    Attributes:
      config: the model here; the embedding's rows are not set.
      vocab_size: rows of the embedding there.
      weights: how each is called and lies.
      copies: names of tensors that duplicate another.
      published: how it was trained and is decoded.
      passed_over: a line on keys of its config.json that change nothing; empty if there are none.
      tokenizers: files that may serve as a vocabulary beside the usual ones.
      sizes_from: where the model's sizes were read, for messages.
    """

    config: ModelConfig
    vocab_size: int
    weights: tuple[Weight, ...]
    copies: dict[str, str]
    published: Published = Published()  # noqa: RUF009  (frozen)
    passed_over: str = ""
    tokenizers: tuple[str, ...] = ()
    sizes_from: str = CONFIG


def describe(folder: Folder, tied: bool | None = None) -> Described:
    """Returns the checked description of a model folder.

    Args:
      folder: the folder, with its headers read.
      tied: True if the embedding also computes the logits; None finds out from the weights.

    Raises:
      UserError: an unknown family, key, value or tensor, or missing tensors.
    """
    where = str(folder.path / CONFIG)
    kind = kind_of(folder.config)
    if kind not in FAMILIES:
        raise UserError(f"{where}: {_not_supported(kind)}")
    family = FAMILIES[kind]
    keys = Keys(folder.config, where, family.aliases, most_layers=len(folder.tensors) or None)
    # As in transformers: said to be tied, and yet different in the files, they are not.
    said = keys.get("tie_word_embeddings", family.tied)
    cut = family.base if family.embedding.removeprefix(family.base) in folder.tensors else ""
    embedding = family.embedding.removeprefix(cut)
    tied = said and _same(folder, family.head, embedding) if tied is None else tied
    vocab_size, config = family.vocab_size(keys), family.config(keys, tied)
    published = family.published(keys) if family.published else Published()
    if settings := keys.mapping(SETTINGS):
        published = recorded(settings, f"{where}, {SETTINGS}")
        shifted, reads_start = bool(settings.get("shifted")), bool(settings.get("reads_start"))
        config = dataclasses.replace(config, shifted=shifted, reads_start=reads_start)
    passed_over = keys.judge()
    copies = {**family.copies, **({family.head: embedding} if tied else {})}
    weights = (dataclasses.replace(w, theirs=w.theirs.removeprefix(cut)) for w in family.weights(config))
    # A diffusion model's config.json may serve as a vocabulary, in the end.
    tokenizers = (*family.tokenizers, CONFIG) if family.published else family.tokenizers
    described = Described(config, vocab_size, tuple(weights), copies, published, passed_over, tokenizers)
    if folder.tensors:
        check_names(folder, described, kind)
    return described


def kind_of(config: Mapping[str, Any]) -> str:
    """Returns the key of a model's family, by its config.json; it may not be in FAMILIES."""
    kind, architectures = config.get("model_type", ""), config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    return next((_BY_ARCHITECTURE[name] for name in names if name in _BY_ARCHITECTURE), str(kind))


def _not_supported(kind: str) -> str:
    if kind == "diffusion_gemma":
        return (
            "DiffusionGemma is not supported: its layers differ in the width of their heads, and it reads its own last "
            "prediction as a second input."
        )
    return f"model_type = {kind!r} is not supported, only {', '.join(FAMILIES)}.{did_you_mean(kind, FAMILIES)}"


def check_names(source: Source, described: Described, kind: str) -> None:
    """Raises a UserError that names the tensors that the source lacks, and those that the model does not have."""
    names = {name for weight in described.weights for name in weight.names(described.config.num_layers)}
    _refuse(f"{source.path} lacks tensors that {kind} has", names - source.tensors.keys())
    unknown = source.tensors.keys() - names - described.copies.keys()
    _refuse(f"{source.path} has tensors that are not known here", unknown)


def _same(folder: Folder, copy: str, name: str) -> bool:
    """True if a tensor is missing or has the same values as another one."""
    if copy not in folder.tensors or name not in folder.tensors:
        return True
    rows, columns = folder.tensors[name].shape
    step = max(1, _COMPARED // columns)
    if folder.tensors[copy].shape != (rows, columns):
        return False
    pieces = ((start, min(start + step, rows)) for start in range(0, rows, step))
    return all((folder.read(copy, *piece) == folder.read(name, *piece)).all() for piece in pieces)


def check_shapes(source: Source, described: Described, definition: ModelDefinition) -> None:
    """Raises a UserError that names a tensor whose shape does not follow from the model's sizes."""
    shapes = param_shapes(definition)
    for weight in described.weights:
        shape = list(shapes[weight.ours][weight.stacked_axes :])
        if weight.ours in VOCABULARY_AXIS:
            shape[VOCABULARY_AXIS[weight.ours]] = described.vocab_size
        for name in weight.names(described.config.num_layers):
            found, expected = source.tensors[name].shape, weight.their_shape(shape)
            if found != expected:
                raise UserError(
                    f"{source.path}: {name} has the shape {found}, and {described.sizes_from} asks for {expected}."
                )


def param_shapes(definition: ModelDefinition) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by name."""
    return {name: leaf.shape for name, leaf in named_leaves(definition.abstract()).items()}


def _refuse(what: str, names: set[str]) -> None:
    if names:
        first = ", ".join(sorted(names)[:5])
        raise UserError(f"{what}: {first}{f', and {len(names) - 5} more' if len(names) > 5 else ''}.")
