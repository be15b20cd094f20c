"""The model families that can be imported, by the `model_type` of their config.json."""

import dataclasses
from types import ModuleType

from diffusion_t5x.checkpointing.assignment import named_leaves
from diffusion_t5x.errors import UserError, did_you_mean
from diffusion_t5x.importing import gemma2, gemma3_text, gpt2, llama, mistral, mt5, qwen2, qwen3, t5
from diffusion_t5x.importing.huggingface import CONFIG, Folder
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import VOCABULARY_AXIS, Source, Weight
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition

# A module has `config(keys, tied)`, `weights(config)`, EMBEDDING and HEAD (names), TIED (what `tie_word_embeddings` is
# where a config.json does not say), SAME (names of copies, and of what); BASE, if files may lack that prefix of their
# names; and ALIASES, if keys of the config.json have other names too.
FAMILIES: dict[str, ModuleType] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "mt5": mt5,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "t5": t5,
}
_COMPARED = 1 << 24  # numbers at a time


@dataclasses.dataclass(frozen=True)
class Described:
    """A source's description of its model, checked.

    Attributes:
      config: our ModelConfig, without the embedding's number of rows.
      vocab_size: number of rows in the source's embedding.
      weights: name and layout of each weight.
      copies: names of tensors that duplicate others.
      passed_over: a line about keys of config.json that change nothing; empty if there are none.
      sizes_from: the source of the model's sizes, for messages.
    """

    config: ModelConfig
    vocab_size: int
    weights: tuple[Weight, ...]
    copies: dict[str, str]
    passed_over: str = ""
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
    kind = folder.config.get("model_type", "")
    if not isinstance(kind, str) or kind not in FAMILIES:
        only = f"only {', '.join(FAMILIES)}.{did_you_mean(str(kind), FAMILIES)}"
        raise UserError(f"{where}: model_type = {kind!r} is not supported, {only}")
    family = FAMILIES[kind]
    keys = Keys(folder.config, where, getattr(family, "ALIASES", None), most_layers=len(folder.tensors))
    # As in transformers: said to be tied, and yet different in the files, they are not.
    said = keys.get("tie_word_embeddings", family.TIED)
    base = getattr(family, "BASE", "")
    cut = base if family.EMBEDDING.removeprefix(base) in folder.tensors else ""
    embedding = family.EMBEDDING.removeprefix(cut)
    tied = said and _same(folder, family.HEAD, embedding) if tied is None else tied
    vocab_size = keys.get("vocab_size")
    config = family.config(keys, tied)
    passed_over = keys.judge()
    copies = family.SAME | ({family.HEAD: embedding} if tied else {})
    weights = (dataclasses.replace(w, theirs=w.theirs.removeprefix(cut)) for w in family.weights(config))
    described = Described(config, vocab_size, tuple(weights), copies, passed_over)
    check_names(folder, described, kind)
    return described


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
        shape = list(shapes[weight.ours][1:] if weight.stacked else shapes[weight.ours])
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
