"""Qwen2's tokenizer from its vocab.json and merges.txt, the only files that Dream's models come with."""

import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.errors import UserError

MERGES, VOCAB = "merges.txt", "vocab.json"
# What a merge does not cross: Qwen2's own rule, as in transformers' tokenization_qwen2.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def text(merges: pathlib.Path) -> str:
    """The text of the tokenizer.json that a merges.txt and the vocab.json beside it make.

    Raises:
      UserError: a file is missing or broken.
    """
    ids = tokenizer_files.read(merges.parent / VOCAB)
    lines = tokenizer_files.read_text(merges).split("\n")
    merged = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(ids, [(first, second) for first, _, second in merged]))
    except Exception as error:  # the library raises no class of its own
        raise UserError(f"{merges} and {VOCAB} beside it are not a BPE tokenizer: {error}.") from error
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()
