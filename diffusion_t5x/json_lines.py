"""Parses JSON from users and other programs."""

import json
from collections.abc import Sequence
from typing import Any

_HARMLESS_DEPTH = 200


def parse(text: str | bytes, distinct: bool = False) -> Any:
    """Parses a JSON text.

    Args:
      text: in UTF-8.
      distinct: refuse objects with duplicate field names; otherwise the last one counts.

    Raises:
      ValueError: it is not JSON, is nested too deeply, or has text that is not Unicode.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_distinct if distinct else None)
        # Half of a surrogate pair, as in "\ud800", is JSON but no text. What is nested deep may be too deep to write.
        is_suspect = "\\u" in text or text.count("[") + text.count("{") > _HARMLESS_DEPTH
        (json.dumps(value, ensure_ascii=False) if is_suspect else text).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise ValueError(f"text that is not Unicode ({error.reason})") from error
    return value


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} occurs twice in one object")
    return fields


def parse_object(line: str) -> dict[str, Any]:
    """Parses a line that must be a JSON object.

    Raises:
      ValueError: as `parse`; or it is not an object, or an object in it has duplicate field names.
    """
    value = parse(line, distinct=True)
    if not isinstance(value, dict):
        raise ValueError('not a JSON object: {"field": "text", ...} is expected.')
    return value
