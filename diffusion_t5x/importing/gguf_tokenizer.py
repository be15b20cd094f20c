"""The tokenizer files of Hugging Face's format, rebuilt from a GGUF file's metadata."""

import enum
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.errors import UserError

_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # the names here and in GGUF
_ENDS = ("eos", "eot", "eom")  # of a text, a turn and a message
# Where words are cut before byte pairs are merged, as in the tokenizer.json of Llama 3 and, with single digits, Qwen 2.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Kind(enum.IntEnum):
    """A token's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def files(values: Mapping[str, Any], where: str) -> dict[str, str]:
    """The contents of tokenizer.json and tokenizer_config.json.

    Also of chat_template.jinja if there is a chat template, and of generation_config.json if more than EOS ends a text.

    Raises:
      UserError: no tokenizer, or of an unsupported kind.
    """
    kind, tokens = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise UserError(f"{where}: tokenizer.ggml.model = {kind!r} is not supported, only 'gpt2' and 'llama'.")
    kinds = values.get("tokenizer.ggml.token_type") or [_Kind.NORMAL] * len(tokens)
    # What stands for no token, at the end, fills the embedding's rows.
    count = max((number for number, each in enumerate(kinds, 1) if each != _Kind.UNUSED), default=0)
    tokens, kinds = tokens[:count], kinds[:count]
    roles = {role: _role(values, name, tokens) for role, name in _ROLES.items()}
    tokenizer = (_byte_level if kind == "gpt2" else _sentencepiece)(values, tokens, kinds, where)
    is_special = {_Kind.CONTROL, _Kind.UNKNOWN, _Kind.UNUSED}
    for token, each in zip(tokens, kinds, strict=True):
        # Runs of spaces are merged like other pieces.
        if each in is_special or (each == _Kind.USER_DEFINED and token.strip(" ▁")):
            added = AddedToken(token, special=each in is_special, normalized=False)
            (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    adds_bos = _adds_bos(values)
    if adds_bos and (bos := roles["bos"]) is not None:
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, number)]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        **{f"{role}_token": token for role, token in roles.items() if token is not None},
    }
    ends = sorted(
        {number for name in _ENDS if isinstance(number := values.get(f"tokenizer.ggml.{name}_token_id"), int)}
    )
    said = {
        tokenizer_files.TOKENIZER: tokenizer.to_str(),
        tokenizer_files.CONFIG: json.dumps(config, indent=2, ensure_ascii=False),
        "chat_template.jinja": values.get("tokenizer.chat_template"),
        "generation_config.json": json.dumps({"eos_token_id": ends}) if len(ends) > 1 else None,
    }
    return {name: text for name, text in said.items() if text is not None}


def _role(values: Mapping[str, Any], name: str, tokens: Sequence[str]) -> str | None:
    number = values.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _adds_bos(values: Mapping[str, Any]) -> bool:
    """True if a text begins with BOS; where the file does not say, as llama.cpp has it for this kind of tokenizer."""
    default = values["tokenizer.ggml.model"] == "llama" or values.get("tokenizer.ggml.pre") in _LLAMA3
    return bool(values.get("tokenizer.ggml.add_bos_token", default))


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_WORDS % digits), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])


_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
# By `tokenizer.ggml.pre`.
_PRE = {
    **dict.fromkeys(_LLAMA3, lambda: _words("{1,3}")),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), lambda: _words("")),
    "smollm": _single_digits,
    "gpt-2": _gpt2_words,
}


def _byte_level(values: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], where: str) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    pre, merges = values.get("tokenizer.ggml.pre"), values.get("tokenizer.ggml.merges")
    if pre not in _PRE or not merges:
        raise UserError(
            f"{where}: tokenizer.ggml.pre = {pre!r} is not supported, only {', '.join(_PRE)}, each with "
            "tokenizer.ggml.merges."
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in _LLAMA3))
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE[pre]()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(values: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], where: str) -> Tokenizer:
    """BPE with "▁" for spaces, which falls back to bytes, as Llama 2 and Gemma have it."""
    scores = values.get("tokenizer.ggml.scores")
    if not scores:
        raise UserError(f"{where} lacks tokenizer.ggml.scores.")
    pieces = [token if token.strip(" ") else "▁" * len(token) for token in tokens]
    mergeable = {
        piece: scores[number]
        for number, (piece, kind) in enumerate(zip(pieces, kinds, strict=False))
        if kind in (_Kind.NORMAL, _Kind.USER_DEFINED)
    }
    unknown = _role(values, "unknown", pieces)
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            _merges(mergeable),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_Kind.BYTE in kinds,
        )
    )
    space = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if values.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model, best first: of two neighbours, whose join has the best score."""
    best_first = sorted(scores, key=lambda piece: -scores[piece])
    cuts = itertools.chain.from_iterable(((piece[:i], piece[i:]) for i in range(1, len(piece))) for piece in best_first)
    return [pair for pair in cuts if pair[0] in scores and pair[1] in scores]
