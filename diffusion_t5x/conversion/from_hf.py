"""From Hugging Face's format: a folder's model as a checkpoint, tensor by tensor."""

import dataclasses
import shutil

import numpy as np

from diffusion_t5x.conversion import families, output
from diffusion_t5x.conversion.huggingface import CARRIED, Folder
from diffusion_t5x.conversion.weights import VOCABULARY_AXIS, Weight
from diffusion_t5x.data.seqio_source import libraries
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.training import checkpoints
from diffusion_t5x.training.streaming import Streamed

_FLOAT32 = np.dtype(np.float32)
_BLOCK = 1 << 24  # numbers of a table that are written at a time


def from_hf(path: str, output_folder: str) -> None:
    """Imports a model from a local folder in Hugging Face's format.

    `output_folder` gets checkpoints/checkpoint_0 (step and parameters), config.json and the tokenizer's files as they
    are, and model.gin. MASK is the first id behind the tokenizer's own: one of the rows that the model keeps in
    reserve, or a new row of the embedding.

    Args:
      path: with config.json, safetensors and a tokenizer.
      output_folder: a folder that is empty or not there.

    Raises:
      UserError: what the folder holds is not supported or does not fit together, or the output is not empty; before
        anything is written.
    """
    libraries()
    from diffusion_t5x.tasks import registration

    to = output.empty_folder(output_folder)
    folder = Folder.open(path)
    described = families.describe(folder)
    tokenizer = folder.tokenizer()
    ids = token_ids(registration.vocabulary(str(tokenizer)))
    rows = described.vocab_size
    if (last := ids.noise_ids()[-1]) >= rows:
        raise UserError(f"{tokenizer} has pieces up to id {last}, but {folder.path} is a model of {rows} ids.")
    config = dataclasses.replace(described.config, vocab_size=rows if ids.size <= rows else None)
    definition = ModelDefinition(config, ids)
    families.check_shapes(folder, described, definition)
    checkpoints.ensure_writable(str(to))

    for name in CARRIED:
        if (folder.path / name).exists():
            shutil.copyfile(folder.path / name, to / name)
    folder.note_tensors(to)
    title = f"{folder.path.name} ({folder.config['model_type']}), imported"
    gin = output.model_gin(title, config, "VOCABULARY_FILE", to / tokenizer.name)
    shapes = families.param_shapes(definition)
    streams = {weight.ours: _stream(folder, weight, shapes[weight.ours]) for weight in described.weights}
    output.save(to, definition, streams, gin)

    layers = f"0-{config.num_layers - 1}"
    output.print_table([(w.theirs.replace("{}", layers), w.ours, f"{list(shapes[w.ours])}") for w in described.weights])
    new = "" if ids.mask_id < rows else ", a new row"
    print(f"{definition.num_params():,} parameters; {rows} rows, MASK is {ids.mask_id}{new}")
    print(f"Wrote {to}: checkpoints/checkpoint_0, {tokenizer.name}, model.gin")


def _stream(folder: Folder, weight: Weight, shape: tuple[int, ...]) -> Streamed:
    """A parameter that is read while it is written: layer by layer, rows of ids in blocks."""
    if weight.ours in VOCABULARY_AXIS:
        return _table(folder, weight, shape)
    if weight.stacked:

        def read(layer: int, _: int) -> np.ndarray:
            return weight.to_ours(folder.read(weight.theirs.format(layer)), shape[1:])[None]

        return Streamed(shape, _FLOAT32, axis=0, step=1, read=read)
    whole = lambda *_: weight.to_ours(folder.read(weight.theirs), shape)  # noqa: E731
    return Streamed(shape, _FLOAT32, axis=0, step=shape[0], read=whole)


def _table(folder: Folder, weight: Weight, shape: tuple[int, ...]) -> Streamed:
    """With a row (or column) for each id; those that the model lacks start at the mean of all others."""
    axis = VOCABULARY_AXIS[weight.ours]
    rows, known = shape[axis], folder.tensors[weight.theirs].shape[0]
    step = max(1, min(rows, _BLOCK // shape[1 - axis]))
    mean = np.zeros(shape[1 - axis])
    if rows > known:
        for start in range(0, known, step):
            mean += folder.read(weight.theirs, start, min(start + step, known)).sum(axis=0, dtype=np.float64) / known

    def read(start: int, stop: int) -> np.ndarray:
        parts = [folder.read(weight.theirs, start, min(stop, known))] if start < known else []
        if stop > known:
            parts.append(np.tile(mean.astype(np.float32), (stop - max(start, known), 1)))
        block = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return block.T if axis else block

    return Streamed(shape, _FLOAT32, axis=axis, step=step, read=read)
