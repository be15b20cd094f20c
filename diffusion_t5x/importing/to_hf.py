"""Exports a checkpoint to Hugging Face's format: as an autoregressive model, or as a published diffusion model."""

import itertools
import operator
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import safetensors.numpy

from diffusion_t5x import records
from diffusion_t5x.checkpointing import checkpoints, restoring
from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import families, formats, model_card, output
from diffusion_t5x.importing.formats import AUTO
from diffusion_t5x.importing.huggingface import CARRIED, CONFIG, DTYPES, INDEX, SINGLE, TENSORS, Folder
from diffusion_t5x.importing.weights import VOCABULARY_AXIS, Weight

MAX_FILE_BYTES = 2 << 30


def to_hf(
    checkpoint: str, output_folder: str, like: str | None = None, form: str = AUTO, dtype: str | None = None
) -> None:
    """Writes a model that was once imported from Hugging Face's format, and perhaps trained since, as what it is now.

    Tensors have the shapes and dtypes that they came with. Rows of ids that the model came without are left out, but
    for those of a diffusion model whose MASK is one of them. What was not trained comes back bit for bit. A diffusion
    model also gets its settings for generation, MASK in the tokenizer, and a model card.

    Args:
      checkpoint: a checkpoint, a folder of them or a MODEL_DIR. If it has a moving average of the parameters, that is
        exported.
      output_folder: a folder that is empty or does not exist.
      like: the folder that `from_hf` wrote; not needed for its own checkpoint.
      form: "auto", "causal" (the autoregressive model, whatever was trained), or one of `formats.FORMATS`.
      dtype: of all tensors, a key of `huggingface.DTYPES`; None keeps the original dtypes.

    Raises:
      UserError: no checkpoint, no folder that `from_hf` wrote, they do not belong together, or the format does not
        hold the model; before anything is written.
    """
    final = output.empty_folder(output_folder)
    opened = checkpoints.open_checkpoint(checkpoint)
    path = pathlib.Path(str(opened))
    origin = Folder.noted(_origin(path, like))
    shapes, read = restoring.open_params(opened)
    tied = "head" not in shapes
    kind = formats.chosen(form, opened.record, families.kind_of(origin.config), str(path))
    source = formats.target(kind, origin, opened.record, tied, dtype)
    described = families.describe(source, tied)
    layers = described.config.num_layers
    for weight in described.weights:
        _check(weight, shapes.get(weight.ours), source, layers, f"{path}, {source.path}")

    with output.building(final) as to:
        for file in CARRIED:
            if (source.path / file).exists():
                shutil.copyfile(source.path / file, to / file)
        if source.config != origin.config:
            records.write_json(to / CONFIG, source.config)
        if kind in formats.FORMATS:
            model_card.write(to, kind, opened, source.config)
        elif kind == formats.DIFFUSION:
            model_card.add_mask(to, source.config["mask_token_id"])
        files = _Files(to, source)
        for (theirs, _), parts in itertools.groupby(described.weights, operator.attrgetter("theirs", "layers")):
            copies = [copy for copy, name in described.copies.items() if name == theirs and copy in source.tensors]
            for name, tensor in _theirs(list(parts), read, described.vocab_size, layers):
                for each in (name, *copies):
                    files.add(each, tensor)
        files.close()
    if kind in formats.FORMATS and not opened.record.imported and not _trained_mask(opened.record):
        print(
            'LOSS_SOFTMAX = "allowed" left MASK out of the softmax in training: programs that do not forbid MASK may '
            "choose it. For these, train with --gin.LOSS_SOFTMAX='\"all\"'."
        )
    as_what = f" as {kind}" if kind != formats.CAUSAL else ""
    print(f"Wrote {final}{as_what}: {sum(map(len, files.written))} tensors in files: {len(files.written)}")


def _trained_mask(record: Record) -> bool:
    """True if the training's loss kept MASK's probability low."""
    return (record.objective or {}).get("softmax") == "all"


def _origin(checkpoint: pathlib.Path, like: str | None) -> pathlib.Path:
    """Returns the folder that `from_hf` wrote: the one named, or the one that contains the checkpoint."""
    folders = [pathlib.Path(like).expanduser().resolve()] if like else [checkpoint.parent.parent, checkpoint.parent]
    for folder in folders:
        if (folder / TENSORS).exists():
            return folder
    raise UserError(
        f"{folders[0]} is not a folder that from_hf wrote (it has no {TENSORS}): give the folder of the import "
        "with --like."
    )


def _check(weight: Weight, shape: tuple[int, ...] | None, source: Folder, layers: int, where: str) -> None:
    """Raises a UserError if a parameter is missing or has another shape than the imported model's."""
    if shape is not None:
        one, stack = list(shape[weight.stacked_axes :]), tuple(shape[: weight.stacked_axes])
        expected = source.tensors[weight.names(layers)[0]].shape
        if weight.ours in VOCABULARY_AXIS:
            axis = VOCABULARY_AXIS[weight.ours]
            one[axis] = min(one[axis], expected[0])
        if weight.their_shape(one) == expected and stack == weight.stack(layers):
            return
    raise UserError(
        f"{where}: the checkpoint is of another model than the one that was imported: {weight.ours} is "
        f"{'not there' if shape is None else list(shape)}."
    )


def _theirs(
    parts: Sequence[Weight], read: Callable[[str], np.ndarray], rows: int, layers: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the source's tensors, see `Weight.names`, of which these weights are the parts."""
    arrays = [read(weight.ours) for weight in parts]
    if parts[0].ours in VOCABULARY_AXIS:
        arrays = [np.take(array, np.arange(rows), axis=VOCABULARY_AXIS[parts[0].ours]) for array in arrays]
    for number, name in enumerate(parts[0].names(layers)):
        pieces = [
            weight.to_theirs(
                array.reshape(-1, *array.shape[weight.stacked_axes :])[number] if weight.stacked else array
            )
            for weight, array in zip(parts, arrays, strict=True)
        ]
        yield name, np.concatenate(pieces, axis=parts[0].joined_axis) if len(pieces) > 1 else pieces[0]


class _Files:
    """Safetensors files of at most MAX_FILE_BYTES each, with an index if there are several."""

    def __init__(self, folder: pathlib.Path, source: Folder):
        self._folder, self._source = folder, source
        self._pending: dict[str, np.ndarray] = {}
        self._bytes = 0
        self.written: list[list[str]] = []

    def add(self, name: str, tensor: np.ndarray) -> None:
        tensor = np.ascontiguousarray(tensor.astype(DTYPES[self._source.tensors[name].dtype]))
        if self._pending and sum(each.nbytes for each in self._pending.values()) + tensor.nbytes > MAX_FILE_BYTES:
            self._write()
        self._pending[name] = tensor

    def _write(self) -> None:
        file = self._folder / f"{len(self.written) + 1}.safetensors"
        file.touch()
        mode = file.stat().st_mode  # of any new file here; safetensors would let nobody else read it
        safetensors.numpy.save_file(self._pending, str(file), {"format": "pt"})
        file.chmod(mode)
        self._bytes += sum(tensor.nbytes for tensor in self._pending.values())
        self.written.append(list(self._pending))
        self._pending = {}

    def close(self) -> None:
        self._write()
        if len(self.written) == 1:
            (self._folder / "1.safetensors").rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.written, 1):
            file = f"model-{number:05}-of-{len(self.written):05}.safetensors"
            (self._folder / f"{number}.safetensors").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
        records.write_json(self._folder / INDEX, index)
