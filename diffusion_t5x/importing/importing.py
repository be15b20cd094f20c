"""Writes a source's tensors to a checkpoint, one by one."""

import dataclasses
import math
import pathlib

import numpy as np

from diffusion_t5x import records
from diffusion_t5x.checkpointing.streaming import Streamed
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import output
from diffusion_t5x.importing.families import Described, check_shapes, param_shapes
from diffusion_t5x.importing.quantizing import quantized
from diffusion_t5x.importing.weights import VOCABULARY_AXIS, Source, Weight
from diffusion_t5x.models.quantized import FewBits
from diffusion_t5x.models.transformer import ModelDefinition

_FLOAT32 = np.dtype(np.float32)
_BLOCK = 1 << 24  # numbers of a table that are written at a time


def definition_of(source: Source, described: Described, ids: TokenIds, tokenizer: pathlib.Path) -> ModelDefinition:
    """Returns our model's definition: MASK is one of the source's reserved rows, or a new row of the embedding.

    Raises:
      UserError: the tokenizer has more ids than the model, or a tensor has an unexpected shape, cannot be read, or has
        NaN or infinite numbers.
    """
    rows = described.vocab_size
    if (last := ids.noise_ids()[-1]) >= rows:
        raise UserError(f"{tokenizer} has pieces up to id {last}, but {source.path} is a model of {rows} ids.")
    config = dataclasses.replace(described.config, vocab_size=rows if ids.size <= rows else None)
    definition = ModelDefinition(config, ids)
    if source.tensors:
        check_shapes(source, described, definition)
        _check_numbers(source, described)
    return definition


def write(
    to: pathlib.Path,
    final: pathlib.Path,
    source: Source,
    described: Described,
    definition: ModelDefinition,
    tokenizer: str,
    kind: str,
    frozen_dtype: FewBits | None = None,
) -> None:
    """Writes checkpoint_0, if there are weights, and model.gin; prints which tensor became which parameter.

    Args:
      to: the folder to write to, with the tokenizer in it.
      final: the folder's final name.
      source, described, definition: the model.
      tokenizer: name of the tokenizer's file.
      kind: the kind of model, as text.
      frozen_dtype: of the matrices of layers; None keeps float32.
    """
    shapes, rows, mask_id = param_shapes(definition), described.vocab_size, definition.vocabulary.mask_id
    config = definition.config
    title, published = f"{source.path.name} ({kind}), imported", described.published
    gin = output.model_gin(title, config, "VOCABULARY_FILE", final / tokenizer, published.gin)
    if source.tensors:
        record = output.record_of(definition, final / tokenizer, published)
        arrays = params(source, described, definition)
        output.save(to, record, quantized(arrays, definition, frozen_dtype) if frozen_dtype else arrays, gin)
    else:
        records.write_text(to / output.MODEL_GIN, gin)

    output.print_table([(_names(w, config.num_layers), w.ours, f"{list(shapes[w.ours])}") for w in described.weights])
    new = "" if mask_id < rows else ", a new row"
    print(f"{definition.num_params():,} parameters; {rows} rows, MASK is {mask_id}{new}")


def params(source: Source, described: Described, definition: ModelDefinition) -> dict[str, Streamed]:
    """Returns the parameters by name, float32; each is read on demand."""
    shapes = param_shapes(definition)
    return {weight.ours: _stream(source, weight, shapes[weight.ours]) for weight in described.weights}


def _names(weight: Weight, layers: int) -> str:
    """The names of a weight's tensors in one, with the ranges of numbers in them."""
    first, end = weight.layers or (0, layers)
    return weight.theirs.replace("{}", f"{first}-{end - 1}").replace("{expert}", f"0-{(weight.experts or 1) - 1}")


def _check_numbers(source: Source, described: Described) -> None:
    """Reads every array once, in blocks. Raises a UserError that names an array with NaN or infinite numbers."""
    layers = described.config.num_layers
    for name in dict.fromkeys(name for weight in described.weights for name in weight.names(layers)):
        rows, *others = source.tensors[name].shape
        step = max(1, _BLOCK // math.prod(others))
        for start in range(0, rows, step):
            check_finite(source.read(name, start, min(start + step, rows)), name, source.path)


def check_finite(array: np.ndarray, name: str, path: str | pathlib.Path) -> None:
    """Raises a UserError if an array has NaN or infinite numbers."""
    if bad := array.size - np.count_nonzero(np.isfinite(array)):
        raise UserError(
            f"{path}: {name} has numbers that are NaN or infinite ({bad:,} of {array.size:,} read): its file is "
            "damaged, or its training broke down."
        )


def _stream(source: Source, weight: Weight, shape: tuple[int, ...]) -> Streamed:
    """Returns a parameter that is read while it is written: layer by layer, rows of ids in blocks."""
    if weight.ours in VOCABULARY_AXIS:
        return _table(source, weight, shape)
    if weight.stacked:
        first, _ = weight.layers or (0, None)

        def read(number: int, _: int) -> np.ndarray:
            names = weight.names_in(first + number)
            arrays = [weight.to_ours(source.read(name), shape[weight.stacked_axes :]) for name in names]
            return np.stack(arrays).reshape(1, *shape[1:])

        return Streamed(shape, _FLOAT32, axis=0, step=1, read=read)
    whole = lambda *_: weight.to_ours(source.read(weight.theirs), shape)  # noqa: E731
    return Streamed(shape, _FLOAT32, axis=0, step=shape[0], read=whole)


def _table(source: Source, weight: Weight, shape: tuple[int, ...]) -> Streamed:
    """Returns a table with a row (or column) for each id; rows that the source lacks start at the mean of its rows."""
    axis = VOCABULARY_AXIS[weight.ours]
    their_axis = 1 - axis if weight.transposed else axis
    rows, known = shape[axis], source.tensors[weight.theirs].shape[their_axis]
    step = max(1, min(rows, _BLOCK // shape[1 - axis]))

    def known_rows(start: int, stop: int) -> np.ndarray:
        block = source.read(weight.theirs, start, min(stop, known), their_axis)
        return block.T if weight.transposed else block

    mean = np.zeros((1, 1))
    if rows > known:
        for start in range(0, known, step):
            mean = mean + known_rows(start, start + step).sum(axis=axis, keepdims=True, dtype=np.float64) / known

    def read(start: int, stop: int) -> np.ndarray:
        parts = [known_rows(start, stop)] if start < known else []
        if stop > known:
            parts.append(np.repeat(mean.astype(np.float32), stop - max(start, known), axis=axis))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)

    return Streamed(shape, _FLOAT32, axis=axis, step=step, read=read)
