"""llama2.c's checkpoints: a header of seven int32, then float32 arrays, all little endian.

Export version 0 of github.com/karpathy/llama2.c (export.py, `legacy_export`; run.c, `memory_map_weights`). Matrices are
`[out, in]`, and every layer's array is stacked over the layers.
"""

import dataclasses
import os
import pathlib

import numpy as np

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig

_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_MAGIC_OF_LATER_VERSIONS = 0x616B3432  # "ak42"


@dataclasses.dataclass(frozen=True)
class Llama2cModel:
    """A checkpoint, with llama2.c's names.

    Attributes:
      dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len: its header; in the file a negative
        vocab_size means a separate output matrix; it is positive here.
      arrays: arrays by name, mapped from the file; with "wcls" if there is an output matrix.
    """

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int
    arrays: dict[str, np.ndarray]

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def config(self) -> ModelConfig:
        """Builds our ModelConfig; the embedding gets its rows from the vocabulary."""
        return ModelConfig(
            embed_dim=self.dim,
            num_layers=self.n_layers,
            num_heads=self.n_heads,
            head_dim=self.head_dim,
            mlp_dim=self.hidden_dim,
            num_kv_heads=self.n_kv_heads,
            position="rotary",
            activation="silu",
            tie_embeddings="wcls" not in self.arrays,
            attention_scale=self.head_dim**-0.5,
            logits_scale=1.0,
            norm_epsilon=1e-5,
            max_length=self.max_seq_len,
        )

    def params(self, rows: int) -> dict[str, tuple[str, np.ndarray]]:
        """Returns the parameters by name, each with the name of the array that it comes from.

        Args:
          rows: number of rows in the embedding. Rows that the checkpoint lacks (MASK and padding) start at the mean of
            its rows.
        """
        a, layers = self.arrays, self.n_layers

        def heads(matrix: np.ndarray) -> np.ndarray:
            """Returns `[layers, heads * head_dim, in]` as `[layers, in, heads, head_dim]`."""
            return matrix.reshape(layers, -1, self.head_dim, self.dim).transpose(0, 3, 1, 2)

        def rotary_heads(matrix: np.ndarray) -> np.ndarray:
            """Returns the same, for rotary positions that rotate (i, i + head_dim/2) and not (2i, 2i + 1)."""
            pairs = matrix.reshape(layers, -1, self.head_dim // 2, 2, self.dim)
            return heads(pairs.swapaxes(2, 3))

        def more_rows(matrix: np.ndarray) -> np.ndarray:
            new = np.tile(matrix.mean(axis=0), (rows - self.vocab_size, 1))
            return np.concatenate([matrix, new])

        block = "decoder/blocks"
        params = {
            "embedding": ("token_embedding_table", more_rows(a["token_embedding_table"])),
            f"{block}/attention_norm/scale": ("rms_att_weight", a["rms_att_weight"]),
            f"{block}/attention/query": ("wq", rotary_heads(a["wq"])),
            f"{block}/attention/key": ("wk", rotary_heads(a["wk"])),
            f"{block}/attention/value": ("wv", heads(a["wv"])),
            f"{block}/attention/out": ("wo", a["wo"].swapaxes(1, 2).reshape(layers, -1, self.head_dim, self.dim)),
            f"{block}/mlp_norm/scale": ("rms_ffn_weight", a["rms_ffn_weight"]),
            f"{block}/mlp/wi_0": ("w1", a["w1"].swapaxes(1, 2)),
            f"{block}/mlp/wi_1": ("w3", a["w3"].swapaxes(1, 2)),
            f"{block}/mlp/wo": ("w2", a["w2"].swapaxes(1, 2)),
            "decoder/final_norm/scale": ("rms_final_weight", a["rms_final_weight"]),
        }
        if "wcls" in a:
            params["head"] = ("wcls", more_rows(a["wcls"]).T)
        return {name: (source, np.ascontiguousarray(values, np.float32)) for name, (source, values) in params.items()}


def read(path: str) -> Llama2cModel:
    """Reads a checkpoint file.

    Raises:
      UserError: it cannot be read, is not such a checkpoint, or is shorter or longer than its header says.
    """
    file = pathlib.Path(path).expanduser()
    try:
        with file.open("rb") as opened:
            start = opened.read(4 * len(_HEADER))
    except OSError as error:
        raise UserError(f"Cannot read the checkpoint {path}: {error.strerror}.") from error
    if len(start) < 4 * len(_HEADER):
        raise UserError(f"{path} is not a llama2.c checkpoint: {len(start)} bytes are too few for its header.")
    header = dict(zip(_HEADER, np.frombuffer(start, "<i4").tolist(), strict=True))
    if header["dim"] == _MAGIC_OF_LATER_VERSIONS:
        raise UserError(f"{path} is a llama2.c checkpoint of a later version; export it with `--version 0`.")
    _check_header(header, path)
    has_head = header["vocab_size"] < 0
    header["vocab_size"] = abs(header["vocab_size"])
    shapes = _shapes(**header, has_head=has_head)
    sizes = {name: int(np.prod(shape, dtype=object)) for name, shape in shapes.items()}
    expected, found = 4 * (len(_HEADER) + sum(sizes.values())), os.path.getsize(file)
    if found != expected:
        raise UserError(
            f"{path} has {found:,} bytes, but a llama2.c checkpoint of {_in_words(header)} has {expected:,}: it is "
            f"{'truncated' if found < expected else 'too long'}, or not such a checkpoint."
        )
    values = np.memmap(file, "<f4", "r", offset=4 * len(_HEADER))
    parts = np.split(values, np.cumsum(list(sizes.values()))[:-1])
    arrays = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return Llama2cModel(**header, arrays=arrays)


def _check_header(header: dict[str, int], path: str) -> None:
    positive = {**header, "vocab_size": abs(header["vocab_size"])}
    heads, kv_heads = header["n_heads"], header["n_kv_heads"]
    if min(positive.values()) < 1:
        wrong = "none may be 0 or negative, but for vocab_size"
    elif header["dim"] % heads:
        wrong = "dim must be a multiple of n_heads"
    elif heads % kv_heads:
        wrong = "n_heads must be a multiple of n_kv_heads"
    elif header["dim"] // heads % 2:
        wrong = "dim / n_heads must be even, for rotary positions"
    else:
        return
    raise UserError(f"{path} is not a llama2.c checkpoint: its header would be {_in_words(header)}, and {wrong}.")


def _in_words(header: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in header.items())


def _shapes(
    *,
    dim: int,
    hidden_dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    vocab_size: int,
    max_seq_len: int,
    has_head: bool,
) -> dict[str, tuple[int, ...]]:
    """Returns the arrays' shapes in the file's order."""
    head_dim = dim // n_heads
    shapes = {
        "token_embedding_table": (vocab_size, dim),
        "rms_att_weight": (n_layers, dim),
        "wq": (n_layers, dim, dim),
        "wk": (n_layers, n_kv_heads * head_dim, dim),
        "wv": (n_layers, n_kv_heads * head_dim, dim),
        "wo": (n_layers, dim, dim),
        "rms_ffn_weight": (n_layers, dim),
        "w1": (n_layers, hidden_dim, dim),
        "w2": (n_layers, dim, hidden_dim),
        "w3": (n_layers, hidden_dim, dim),
        "rms_final_weight": (dim,),
        "freq_cis_real": (max_seq_len, head_dim // 2),  # of rotary positions: they are computed, here and there
        "freq_cis_imag": (max_seq_len, head_dim // 2),
    }
    return shapes | ({"wcls": (vocab_size, dim)} if has_head else {})
