"""Hugging Face's tokenizers (a `tokenizer.json`) as a vocabulary."""

import functools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import tokenizers

from diffusion_t5x.data import qwen2_tokenizer, tokenizer_files
from diffusion_t5x.data.vocabulary import ReadVocabulary
from diffusion_t5x.errors import UserError

_ROLES = ("bos", "eos", "pad", "unk", "mask")


class HuggingFaceVocabulary(ReadVocabulary):
    """Encodes and decodes with the `tokenizers` library, without the special tokens it adds around a text.

    What ends a text, begins one and pads is named by the files beside the tokenizer, with the precedence that they have
    in `transformers`: tokenizer_config.json where it has `added_tokens_decoder`, else special_tokens_map.json before
    it; config.json comes last. Where none names a pad token, EOS pads. Tokens that these files add are added.
    MASK is config.json's `mask_token_id`, which may lie behind the tokenizer's ids, or else the mask token that the
    other files name. `contents` are the tokenizer's file and these ids, `folder` is where they come from.

    Args:
      path: a tokenizer.json; or merges.txt, with a vocab.json beside it, which are read as Qwen2's.
      mask_id: of MASK; None takes the one that the files name.

    Raises:
      UserError: it cannot be read or has another format, or nothing beside it names a token that ends a text.
    """

    def __init__(self, path: str, mask_id: int | None = None):
        self.file = path
        file = pathlib.Path(path).expanduser()
        self.folder = file.parent
        text = qwen2_tokenizer.text(file) if file.name == qwen2_tokenizer.MERGES else tokenizer_files.read_text(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no class of its own
            raise UserError(f"{path} is not a tokenizer.json that the tokenizers library can read: {error}.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._text = self._tokenizer.to_str() if _add_tokens(self._tokenizer, file) else text
        ids = self._tokenizer.get_vocab().values()
        beside = (tokenizer_files.CONFIG, tokenizer_files.ADDED, qwen2_tokenizer.VOCAB)
        tokenizer_files.check_room(ids, [file, *(file.parent / name for name in beside)], file)
        self.vocab_size = 1 + max(ids)
        self._ids = _special_ids(file.parent, self._tokenizer)
        self._ids["mask"] = self._ids["mask"] if mask_id is None else mask_id
        eos_id, pad_id = self._ids["eos"], self._ids["pad"]
        if eos_id is None:
            raise UserError(
                f"No file beside {path} says which token ends a text: add a tokenizer_config.json with an eos_token "
                "that the tokenizer has."
            )
        self.eos_id, self.pad_id = eos_id, eos_id if pad_id is None else pad_id
        self.bos_id, self.unk_id, self.mask_id = (self._ids[role] for role in ("bos", "unk", "mask"))
        self._ids["pad"] = self.pad_id
        if self.mask_id is None:
            del self._ids["mask"]  # so that `contents` stay those of vocabularies from before there were masks
        self.contents = f"{json.dumps(self._ids)} {self._text}".encode()

    @functools.cached_property
    def adds_bos(self) -> bool:
        """True if the tokenizer puts BOS before a text: as `add_bos_token` beside it says, else as it does itself."""
        said = tokenizer_files.read(self.folder / tokenizer_files.CONFIG)
        if isinstance(adds := said.get("add_bos_token"), bool):
            return adds and self.bos_id is not None
        return self._tokenizer.encode("").ids[:1] == [self.bos_id]

    @functools.cached_property
    def puts_space(self) -> bool:
        return self.encode("a") != self.encode_part("a", begins=False)

    def special_tokens(self) -> list[str]:
        """Tokens that the library treats as special anywhere in a text, and those that begin, end and pad a text."""
        special = {token for token, added in self._added.items() if added.special}
        roles = {token for token in self._ids.values() if token is not None}
        names = map(self._tokenizer.id_to_token, sorted(special | roles))
        return [name for name in names if name is not None]

    def is_text(self) -> np.ndarray:
        text = np.zeros(self.vocab_size, bool)
        text[list(self._tokenizer.get_vocab().values())] = True
        special = [token for token, added in self._added.items() if added.special]
        text[special + [token for token in (self.bos_id, self.unk_id) if token is not None]] = False
        return text

    def sentinel_ids(self) -> list[int]:
        ids: list[int] = []
        while (token := self._tokenizer.token_to_id(f"<extra_id_{len(ids)}>")) is not None:
            ids.append(token)
        return ids

    def piece(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token) or ""
        if token in self._added:
            return name.encode()
        if self._is_byte_level:
            return bytes(_BYTES[character] for character in name)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(byte[1])
        return name.replace("▁", " ").encode()

    def encode_part(self, text: str, begins: bool) -> list[int]:
        tokenizer = self._tokenizer if begins else self._part_tokenizer
        return tokenizer.encode(text, add_special_tokens=False).ids

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).encode()

    @functools.cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return any(part["type"] == "ByteLevel" for part in _parts(json.loads(self._text)["decoder"]))

    @functools.cached_property
    def _part_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer without the space that it adds in front of a text."""
        spec = json.loads(self._text)
        for part in _parts(spec["normalizer"]):
            if part["type"] == "Prepend":
                part["prepend"] = ""
        for part in _parts(spec["pre_tokenizer"]):
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
            elif part["type"] == "ByteLevel":
                part["add_prefix_space"] = False
        return tokenizers.Tokenizer.from_str(json.dumps(spec | {"truncation": None, "padding": None}))


def _add_tokens(tokenizer: tokenizers.Tokenizer, file: pathlib.Path) -> bool:
    """Adds the tokens that the files beside a tokenizer.json name and it lacks, like `transformers`.

    Raises:
      UserError: a token has another id in the tokenizer than the files say.
    """
    found = sorted(tokenizer_files.added_tokens(file.parent).items())
    lacking = [token for _, token in found if tokenizer.token_to_id(token.content) is None]
    for token in lacking:
        options = {"normalized": not token.is_special} | dict(token.options)
        tokenizer.add_tokens([tokenizers.AddedToken(token.content, special=token.is_special, **options)])
    for number, token in found:
        if (id_here := tokenizer.token_to_id(token.content)) != number:
            raise UserError(
                f"{token.file}: {token.content!r} should have the id {number}, but has {id_here} in {file}: take "
                "out the file that is wrong."
            )
    return bool(lacking)


def _special_ids(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> dict[str, int | None]:
    """The id of each role, from the first file that names it; but MASK's from config.json first."""
    names = [tokenizer_files.CONFIG, tokenizer_files.SPECIAL, "config.json"]
    files = {folder / name: tokenizer_files.read(folder / name) for name in names}
    if "added_tokens_decoder" not in files[folder / names[0]]:
        names[:2] = names[1::-1]
    ids: dict[str, int | None] = dict.fromkeys(_ROLES)
    said = files[folder / "config.json"].get("mask_token_id")
    ids["mask"] = said if _is_id(said) else None
    for file in (folder / name for name in names):
        for role in _ROLES:
            text = tokenizer_files.token_text(files[file], f"{role}_token", file)
            token = files[file].get(f"{role}_token_id") if text is None else tokenizer.token_to_id(text)
            token = token[0] if isinstance(token, list) and token else token
            if ids[role] is None and _is_id(token) and tokenizer.id_to_token(token) is not None:
                ids[role] = token
    return ids


def _is_id(token: Any) -> TypeGuard[int]:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 1 << 32


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the parts of a normalizer, pre-tokenizer or decoder, with sequences flattened."""
    if component is None:
        return []
    inner = next((component[key] for key in ("normalizers", "pretokenizers", "decoders") if key in component), None)
    return [component] if inner is None else [part for each in inner for part in _parts(each)]


def _byte_characters() -> dict[str, int]:
    """Returns the printable character for each byte in byte-level vocabularies (GPT-2's `encoder.py`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()
