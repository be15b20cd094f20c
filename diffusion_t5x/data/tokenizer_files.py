"""Reads special and added tokens from the files beside a tokenizer in Hugging Face's format."""

import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any

from diffusion_t5x.data import text_files
from diffusion_t5x.errors import UserError

CONFIG = "tokenizer_config.json"
_OPTIONS = ("lstrip", "rstrip", "single_word", "normalized")
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that was added to a tokenizer's own.

    Attributes:
      content: its text.
      is_special: it does not represent text.
      file: the file that defines it.
      options: options of the library `tokenizers`, such as ("lstrip", True).
    """

    content: str
    is_special: bool
    file: pathlib.Path
    options: tuple[tuple[str, bool], ...] = ()


def read_text(file: pathlib.Path) -> str:
    """The text of a tokenizer's file. Raises a UserError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the tokenizer {file}: {error}.") from error


def read(file: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file; empty if there is no file.

    Raises:
      UserError: it cannot be read, or is not a JSON object.
    """
    if not file.exists():
        return {}
    said = text_files.json_value(file)
    if not isinstance(said, dict):
        raise UserError(f"{file} should be a JSON object, and is {str(said)[:40]!r}.")
    return said


def token_text(said: dict[str, Any], name: str, file: pathlib.Path) -> str | None:
    """Returns the text of the token that a file names, directly or in an object's `content`. None if there is none.

    Raises:
      UserError: it is neither.
    """
    token = said.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if (text is not None and not isinstance(text, str)) or (isinstance(token, dict) and text is None):
        raise UserError(f'{file}: {name} = {str(token)[:60]} should be a text, or an object with a "content".')
    return text


def added_tokens(folder: pathlib.Path) -> dict[int, AddedToken]:
    """Returns the added tokens of a tokenizer by id, from the files beside it.

    As in `transformers`, they are in `added_tokens_decoder` of tokenizer_config.json or, if it has none, in
    added_tokens.json. Tokens that tokenizer.json itself adds are not included.

    Raises:
      UserError: a file has another format.
    """
    config = read(folder / CONFIG)
    if (decoder := config.get("added_tokens_decoder")) is None:
        file = folder / ADDED
        special = _special_texts(folder, config)
        said = {number: {"content": text, "special": text in special} for text, number in read(file).items()}
        return {_id(number, file): _token(token, file) for number, token in said.items()}
    if not isinstance(decoder, dict) or not all(isinstance(token, dict) for token in decoder.values()):
        raise UserError(
            f"{folder / CONFIG}: added_tokens_decoder should be an object of objects, not {str(decoder)[:40]!r}."
        )
    file = folder / CONFIG
    return {_id(int(key) if key.isdecimal() else key, file): _token(token, file) for key, token in decoder.items()}


def beside(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that say which tokens are added to a SentencePiece model in a folder."""
    return [file for name in (TOKENIZER, CONFIG, SPECIAL, ADDED) if (file := folder / name).exists()]


def in_tokenizer(file: pathlib.Path) -> dict[int, AddedToken]:
    """Returns the added tokens in a tokenizer.json, by id."""
    tokens = read(file).get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise UserError(f"{file}: added_tokens should be a list of objects.")
    return {_id(token.get("id"), file): _token(token, file) for token in tokens}


def check_room(ids: Collection[int], files: list[pathlib.Path], what: pathlib.Path) -> None:
    """Raises a UserError if the highest id is too large for the files' sizes: each id takes at least a byte."""
    room = sum(file.stat().st_size for file in files if file.exists())
    if ids and (last := max(ids)) >= room:
        raise UserError(f"{what} has the id {last}, which is more than {room:,} bytes of tokens can hold.")


def _special_texts(folder: pathlib.Path, config: dict[str, Any]) -> set[str]:
    texts: set[str] = set()
    for file, said in ((folder / CONFIG, config), (folder / SPECIAL, read(folder / SPECIAL))):
        names = [name for name in said if name.endswith("_token") and not name.startswith("add_")]  # (add_bos_token)
        texts.update(text for name in names if (text := token_text(said, name, file)))
        for name in ("additional_special_tokens", "extra_special_tokens"):
            tokens = said.get(name) or []
            tokens = {str(number): token for number, token in enumerate(tokens)} if isinstance(tokens, list) else tokens
            if not isinstance(tokens, dict):
                raise UserError(f"{file}: {name} should be a list, not {str(tokens)[:40]!r}.")
            texts.update(text for key in tokens if (text := token_text(tokens, key, file)))
    return texts


def _id(number: Any, file: pathlib.Path) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise UserError(f"{file}: {str(number)[:40]!r} is not a token id.")
    return number


def _token(said: dict[str, Any], file: pathlib.Path) -> AddedToken:
    if not (text := token_text(said, "content", file)):
        raise UserError(f"{file} has an added token without a text.")
    options = tuple((name, bool(said[name])) for name in _OPTIONS if name in said)
    return AddedToken(text, bool(said.get("special")), file, options)
