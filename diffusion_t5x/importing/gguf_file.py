"""A GGUF file (llama.cpp's format) read as a folder in Hugging Face format."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import gguf
import numpy as np

from diffusion_t5x import records
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import gguf_config, gguf_tokenizer
from diffusion_t5x.importing.huggingface import CONFIG, DTYPES, Folder, Tensor
from diffusion_t5x.user_cache import user_cache


@dataclasses.dataclass(frozen=True)
class GgufFile(Folder):
    """A GGUF file with the names, settings and tokenizer of the model in Hugging Face format.

    `path` is a folder in the user's cache that holds the rebuilt config.json and tokenizer files.

    Attributes:
      stored: the file's tensors, under the names of the Hugging Face format.
      layout: says how their numbers are laid out.
    """

    stored: Mapping[str, gguf.ReaderTensor] = dataclasses.field(kw_only=True)
    layout: gguf_config.Layout = dataclasses.field(kw_only=True)

    @classmethod
    def open_file(cls, path: str, ignore_keys: Sequence[str] = ()) -> Self:
        """Reads the file's metadata, and no weights yet.

        Args:
          path: the file; of a model in several files, the first one.
          ignore_keys: metadata keys to read as if they were absent.

        Raises:
          UserError: the file is broken, not the first one of its model, or of an unsupported architecture,
            quantization or tokenizer; or another piece of the model is missing.
        """
        file = pathlib.Path(path).expanduser().resolve()
        values, tensors = _read(file)
        tensors += [tensor for piece in _other_pieces(file, values) for tensor in _read(piece)[1]]
        gguf_config.drop_keys(values, ignore_keys, str(file))
        layout = gguf_config.layout(values, str(file))
        stored = {layout.name(tensor.name): tensor for tensor in tensors}
        factors = stored.pop(gguf_config.ROTARY_FACTORS, None)
        for tensor in (*stored.values(), *([] if factors is None else [factors])):
            _check_type(tensor, file)
        config = gguf_config.config(
            values,
            str(file),
            rows=_shape(stored, gguf_config.EMBEDDING, file)[0],
            tied=gguf_config.HEAD not in stored,
            rotary_factors=None if factors is None else _numbers(factors.data, factors).ravel(),
        )
        folder = _unpacked(file, config, gguf_tokenizer.files(values, str(file)))
        kinds = {name: tensor.tensor_type.name for name, tensor in stored.items()}
        found = {
            name: Tensor(str(file), kind if kind in DTYPES else "F32", _shape(stored, name, file))
            for name, kind in kinds.items()
        }
        return cls(folder, config, found, stored=stored, layout=layout)

    def read(self, name: str, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """See `Source`. Only the rows asked for are dequantized."""
        tensor = self.stored[name]
        rows = self.layout.rows(name, len(tensor.data))
        if axis:
            return self.layout.values(name, _numbers(tensor.data[rows], tensor))[:, start:stop]
        return self.layout.values(name, _numbers(tensor.data[rows[start:stop]], tensor))


def _read(file: pathlib.Path) -> tuple[dict[str, Any], list[gguf.ReaderTensor]]:
    """The metadata by key, and the tensors."""
    if not file.is_file():
        raise UserError(f"There is no file {file}.")
    try:
        reader = gguf.GGUFReader(file)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:  # the package has no errors of its own
        raise UserError(f"{file} is broken, or not a GGUF file: {error}.") from error
    return values, list(reader.tensors)


def _other_pieces(file: pathlib.Path, values: Mapping[str, Any]) -> list[pathlib.Path]:
    """The files with the rest of a model that `llama-gguf-split` cut, from the first one and its metadata."""
    count = values.get("split.count", 1)
    if count <= 1:
        return []
    number = values.get("split.no", 0) + 1
    ending = f"-{number:05d}-of-{count:05d}.gguf"
    if not file.name.endswith(ending):
        raise UserError(f"{file} is piece {number} of {count}, so its name has to end in {ending}.")
    pieces = [
        file.with_name(f"{file.name.removesuffix(ending)}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)
    ]
    if number != 1:
        raise UserError(f"{file} is piece {number} of {count}: give the first one, {pieces[0].name}.")
    if missing := [piece.name for piece in pieces if not piece.is_file()]:
        raise UserError(f"{file} is one of {count} pieces; missing beside it: {', '.join(missing)}.")
    return pieces[1:]


def _shape(stored: Mapping[str, gguf.ReaderTensor], name: str, file: pathlib.Path) -> tuple[int, ...]:
    """A tensor's shape; GGUF counts the axes from the last one."""
    if name not in stored:
        raise UserError(f"{file} lacks the tensor {name}.")
    return tuple(reversed(stored[name].shape.tolist()))


def _numbers(data: np.ndarray, tensor: gguf.ReaderTensor) -> np.ndarray:
    """Float32 values of a tensor's stored rows."""
    return gguf.dequantize(np.ascontiguousarray(data), tensor.tensor_type)


def _check_type(tensor: gguf.ReaderTensor, file: pathlib.Path) -> None:
    """Raises a UserError for a tensor that cannot be dequantized."""
    try:
        _numbers(tensor.data[:1], tensor)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"{file}: {tensor.name} is stored as {tensor.tensor_type.name}, which the package gguf cannot dequantize: "
            "convert the file to another type with llama-quantize."
        ) from error


def _unpacked(file: pathlib.Path, config: dict[str, Any], files: dict[str, str]) -> pathlib.Path:
    """The folder in the user's cache with these files, written where it is not there yet."""
    contents = files | {CONFIG: json.dumps(config, indent=2)}
    key = hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()[:16]
    folder = user_cache() / "gguf" / key / file.stem
    for name, text in contents.items():
        if not (folder / name).exists():
            records.write_text(folder / name, text)
    return folder
