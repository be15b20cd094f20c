"""A model's folder in Hugging Face's format: its config.json, its safetensors files, its tokenizer."""

import dataclasses
import pathlib
from typing import Any, Self

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from diffusion_t5x import json_lines, records
from diffusion_t5x.errors import UserError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TENSORS = "tensors.json"
SINGLE = "model.safetensors"
# Of old files; nothing reads them.
_BUFFERS = (
    "rotary_emb.inv_freq", "EncDecAttention.relative_attention_bias.weight", ".attn.bias", ".attn.masked_bias",
)  # fmt: skip
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# The first of these that is there is the vocabulary. T5's and mT5's own is SentencePiece.
TOKENIZERS = ("spiece.model", "tokenizer.json", "tokenizer.model")
# What else goes along with a model.
CARRIED = (
    CONFIG, *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a file's header says of a tensor.

    Attributes:
      file: the path.
      dtype: a key of DTYPES.
      shape: of the tensor.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder whose headers have been read, and no weights yet.

    Attributes:
      path: the folder.
      config: the contents of config.json.
      tensors: by name.
    """

    path: pathlib.Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, path: str) -> Self:
        """Reads config.json, the index and the files' headers.

        Raises:
          UserError: a file that is missing, broken or not in this format, or tensors of other dtypes.
        """
        folder = pathlib.Path(path).expanduser().resolve()
        config = read_json(folder / CONFIG)
        tensors: dict[str, Tensor] = {}
        for name in _shards(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]:
            tensors |= _read_header(folder / name)
        return cls(folder, config, tensors)

    def read(self, name: str, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """See `Source`. The file is opened anew, so that no page of it stays in memory."""
        with safetensors.safe_open(self.tensors[name].file, "numpy") as file:
            where = (slice(None),) * axis + (slice(start, stop),)
            return file.get_slice(name)[where].astype(np.float32, copy=False)

    def note_tensors(self, to: pathlib.Path) -> None:
        """Writes what the headers say beside an imported model, so that the way back gives the same files' contents."""
        noted = {name: [tensor.dtype, tensor.shape] for name, tensor in self.tensors.items()}
        records.write_json(to / TENSORS, noted, indent=0)

    @classmethod
    def noted(cls, path: pathlib.Path) -> Self:
        """The folder that an imported model was, without its weights, from what lies beside that."""
        noted = {name: said for name, said in read_json(path / TENSORS).items() if not name.endswith(_BUFFERS)}
        tensors = {name: Tensor("", dtype, tuple(shape)) for name, (dtype, shape) in noted.items()}
        return cls(path, read_json(path / CONFIG), tensors)

    def tokenizer(self) -> pathlib.Path:
        """The file of the vocabulary.

        Raises:
          UserError: there is none.
        """
        for name in TOKENIZERS:
            if (self.path / name).exists():
                return self.path / name
        has_parts = (self.path / "merges.txt").exists()
        hint = " There is merges.txt: transformers' AutoTokenizer saves it as tokenizer.json." if has_parts else ""
        raise UserError(f"{self.path} has no tokenizer: none of {', '.join(TOKENIZERS)} is there.{hint}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file's JSON object. Raises a UserError where there is none."""
    try:
        found = json_lines.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object.")
    return found


def _shards(index: pathlib.Path) -> list[str]:
    """The files that an index names, which lie beside it."""
    where = read_json(index).get("weight_map")
    names = where.values() if isinstance(where, dict) else [None]
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise UserError(f"{index}: weight_map should name files beside it, not {name!r}.")
    return sorted(set(names))


def _read_header(file: pathlib.Path) -> dict[str, Tensor]:
    if not file.exists():
        others = sorted(path.name for path in file.parent.glob("*.bin"))
        hint = f" There is {others[0]}: save the model as safetensors first." if others else ""
        raise UserError(f"{file} is missing.{hint}")
    found = {}
    try:
        with safetensors.safe_open(str(file), "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
                if name.endswith(_BUFFERS):
                    continue
                header = opened.get_slice(name)
                found[name] = Tensor(str(file), header.get_dtype(), tuple(header.get_shape()))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is broken, or no safetensors file: {error}.") from error
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{file}: {name} is {tensor.dtype}; only {', '.join(DTYPES)} are supported.")
    return found
