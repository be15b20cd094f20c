"""A model folder in Hugging Face's format: its config.json, its safetensors files, its tokenizer."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from diffusion_t5x import json_lines, records
from diffusion_t5x.errors import UserError, did_you_mean

CONFIG = "config.json"
IGNORED = "ignored_keys.json"
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
    """A tensor's entry in a file's header.

    Attributes:
      file: path of the file.
      dtype: a key of DTYPES.
      shape: shape of the tensor.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model folder whose headers have been read, but no weights.

    Attributes:
      path: path of the folder.
      config: the contents of config.json, without ignored keys.
      tensors: tensors by name; none where only the model's description is read.
      ignored: the ignored keys.
    """

    path: pathlib.Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    ignored: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: str, weights: bool = True) -> Self:
        """Reads config.json, the index and the files' headers; without weights, only config.json.

        Raises:
          UserError: a file is missing, broken or not in this format, or a tensor has another dtype.
        """
        folder = pathlib.Path(path).expanduser().resolve()
        for name in (*CARRIED, SINGLE, INDEX):
            _check_link(folder / name)
        config = read_json(folder / CONFIG)
        if not weights:
            return cls(folder, config, {})
        # As in `transformers`, an index counts where there is no single file.
        names = [SINGLE] if (folder / SINGLE).exists() or not (folder / INDEX).exists() else shards(folder / INDEX)
        tensors: dict[str, Tensor] = {}
        for name in names:
            found = _read_header(folder / name)
            if twice := found.keys() & tensors.keys():
                raise UserError(f"{folder}: {min(twice)} is in several files, such as {name}: only one can be meant.")
            tensors |= found
        return cls(folder, config, tensors)

    def without_keys(self, names: Sequence[str]) -> Self:
        """Returns the folder without these keys of config.json. Raises a UserError if one does not exist."""
        for name in names:
            if name not in self.config:
                hint = did_you_mean(name, self.config)
                raise UserError(f"--ignore_keys: {self.path / CONFIG} has no key {name!r}.{hint}")
        config = {name: value for name, value in self.config.items() if name not in names}
        return dataclasses.replace(self, config=config, ignored=tuple(names))

    def with_keys(self, said: Mapping[str, Any]) -> Self:
        """The same with these keys in config.json instead of its own."""
        return dataclasses.replace(self, config={**self.config, **said})

    def read(self, name: str, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """Reads an array, see `Source`. The file is opened again each time, so that no page of it stays in memory."""
        with safetensors.safe_open(self.tensors[name].file, "numpy") as file:
            where = (slice(None),) * axis + (slice(start, stop),)
            return file.get_slice(name)[where].astype(np.float32, copy=False)

    def note_tensors(self, to: pathlib.Path) -> None:
        """Writes the headers next to an imported model, so that an export gives files with the same contents."""
        noted = {name: [tensor.dtype, tensor.shape] for name, tensor in self.tensors.items()}
        records.write_json(to / TENSORS, noted, indent=0)
        if self.ignored:
            records.write_json(to / IGNORED, {"ignored": list(self.ignored)})

    @classmethod
    def noted(cls, path: pathlib.Path) -> Self:
        """Returns the folder that an imported model was, without its weights, from the notes next to the model."""
        for name in (*CARRIED, TENSORS, IGNORED):
            _check_link(path / name)
        noted = {name: said for name, said in read_json(path / TENSORS).items() if not name.endswith(_BUFFERS)}
        tensors = {name: Tensor("", dtype, tuple(shape)) for name, (dtype, shape) in noted.items()}
        ignored = read_json(path / IGNORED)["ignored"] if (path / IGNORED).exists() else ()
        return cls(path, read_json(path / CONFIG), tensors).without_keys(ignored)

    def tokenizer(self, others: Sequence[str] = ()) -> pathlib.Path:
        """The file of the vocabulary. A spiece.model of other pieces than the tokenizer.json beside it is ignored.

        Args:
          others: files that serve where there is none of TOKENIZERS.

        Raises:
          UserError: there is none.
        """
        spiece, tokenizer = self.path / TOKENIZERS[0], self.path / TOKENIZERS[1]
        if spiece.exists() and tokenizer.exists() and not _same_pieces(spiece, tokenizer):
            print(f"{spiece} is ignored, as in transformers: {tokenizer.name} has different pieces.")
            return tokenizer
        for name in (*TOKENIZERS, *others):
            if (self.path / name).exists():
                return self.path / name
        has_parts = (self.path / "merges.txt").exists()
        hint = " There is merges.txt: transformers' AutoTokenizer saves it as tokenizer.json." if has_parts else ""
        raise UserError(f"{self.path} has no tokenizer: none of {', '.join(TOKENIZERS)} is there.{hint}")


def _same_pieces(spiece: pathlib.Path, tokenizer: pathlib.Path) -> bool:
    """True if a SentencePiece model's pieces have the same ids in a tokenizer.json."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    except (RuntimeError, OSError):
        return True  # no SentencePiece model: that is said when it is read
    parts = read_json(tokenizer).get("model")
    pieces = parts.get("vocab") if isinstance(parts, dict) else None
    if isinstance(pieces, dict):
        ids = pieces
    else:
        entries = [piece for piece in pieces or [] if isinstance(piece, list) and piece]
        ids = {piece[0]: number for number, piece in enumerate(entries)}
    names = {number: str(name).removeprefix("▁") for name, number in ids.items()}
    return all(names.get(i) == model.IdToPiece(i).removeprefix("▁") for i in range(model.GetPieceSize()))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns a file's JSON object. Raises a UserError if there is none."""
    try:
        found = json_lines.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object.")
    return found


def _check_link(file: pathlib.Path) -> None:
    """Raises a UserError for a link that leads out of the folder.

    In the cache of Hugging Face's hub, links from models--NAME/snapshots/REVISION to models--NAME/blobs are allowed.
    """
    folder = file.parent
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    root, target = folder.parent.parent if in_cache else folder, file.resolve()
    if not target.is_relative_to(root):
        raise UserError(f"{file} is a link that leads out of {root}: replace it with the file itself.")
    if target.exists() and not target.is_file():
        raise UserError(f"{file} is not a regular file.")


def shards(index: pathlib.Path) -> list[str]:
    """Returns the files that an index names, in the index's folder."""
    where = read_json(index).get("weight_map")
    names = where.values() if isinstance(where, dict) else [None]
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise UserError(f"{index}: weight_map should name files beside it, not {name!r}.")
    return sorted(set(names))


def _read_header(file: pathlib.Path) -> dict[str, Tensor]:
    _check_link(file)
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
        raise UserError(f"{file} is broken, or not a safetensors file: {error}.") from error
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{file}: {name} is {tensor.dtype}; only {', '.join(DTYPES)} are supported.")
    return found
