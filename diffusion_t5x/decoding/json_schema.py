"""JSON schemas as regular expressions, of the part of JSON Schema that a regular expression can hold exactly."""

import dataclasses
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any, Self

from diffusion_t5x.data.plain_vocabularies import ByteVocabulary
from diffusion_t5x.decoding.language import Language, library
from diffusion_t5x.errors import UserError

_SAYS_NOTHING = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_SAYS_NOTHING |= {"$schema", "$id", "$comment", "$defs", "definitions"}
_KEYWORDS: Mapping[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    **{name: set() for name in ("integer", "number", "boolean", "null")},
}
# Those of outlines-core 0.2 allow more than the formats do. These have no year before 1000, and no 29 February.
_DAY = "(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31"
_DATE = f"[1-9][0-9]{{3}}-(?:{_DAY})"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"(?:{_DATE})T{_TIME}",
    "uuid": "[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}",
}
_STRING = r'"(?:[^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])*"'
_SCALAR = rf"(?:{_STRING}|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null)"
_CHOICES = {"anyOf", "enum"}
_NUMBERS = {"minItems", "maxItems", "minLength", "maxLength"}
_FORM_OF: Mapping[str, type] = {"properties": Mapping, "required": list, "anyOf": list, "enum": list, "pattern": str}
_TYPES: Mapping[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
}


def pattern_of(schema: Any, name: str) -> str:
    """Returns a regular expression whose texts are JSON that is valid by a schema.

    Objects have their properties in the schema's order, at most one space is between two signs, and a `pattern` holds
    for the whole string. What the schema leaves open may be left out: an object has no properties but those listed.

    Args:
      schema: the schema, as parsed JSON.
      name: what it is called in messages.

    Raises:
      UserError: a keyword that cannot be kept exactly, or a schema that outlines-core refuses.
    """
    try:
        return library().json_schema.build_regex_from_schema(
            json.dumps(_checked(schema, _Place(f"{name}, at $", schema)))
        )
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{name} is refused: {error}") from error


def any_object(depth: int = 3) -> str:
    """Returns a regular expression of JSON objects; at most one space is between two signs.

    Args:
      depth: number of objects and lists within each other, at most.
    """
    value, written = _SCALAR, ""
    for _ in range(depth):
        # What repeats comes first: the automaton has its states once.
        pair = f"{_STRING} ?: ?{value}"
        written = rf"\{{ ?(?:(?:{pair} ?, ?)*{pair} ?)?\}}"
        value = rf"(?:{_SCALAR}|{written}|\[ ?(?:(?:{value} ?, ?)*{value} ?)?\])"
    return written


@dataclasses.dataclass(frozen=True)
class _Place:
    """A place in a schema.

    Attributes:
      name: what it is called in messages.
      root: the whole schema.
      refs: the references that led to it.
    """

    name: str
    root: Any
    refs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def inner(self, name: str) -> Self:
        """Returns a place within this one."""
        return dataclasses.replace(self, name=self.name + name)

    def referred(self, ref: Any) -> tuple[Any, Self]:
        """Returns the schema that a `$ref` names, and its place."""
        if not isinstance(ref, str) or ref.partition("/")[0] != "#":
            raise UserError(f"{self}: '$ref' must be a path in the schema, such as \"#/$defs/name\"; got {ref!r}.")
        if ref in self.refs:
            raise UserError(f"{self}: {ref!r} refers to itself, and a regular expression cannot hold that.")
        found = self.root
        for key in ref.split("/")[1:]:
            key = urllib.parse.unquote(key).replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                raise UserError(f"{self}: {ref!r} is not in the schema.")
            found = found[key]
        return found, dataclasses.replace(self, refs=(*self.refs, ref))


def _checked(schema: Any, where: _Place) -> dict[str, Any]:
    """Returns a schema in the form that outlines-core keeps; raises a UserError for what it would ignore."""
    if not isinstance(schema, Mapping):
        raise UserError(f"{where}: a schema is an object, not {json.dumps(schema)}.")
    says = {name: value for name, value in schema.items() if name not in _SAYS_NOTHING}
    return _kept(says, where)


def _kept(says: dict[str, Any], where: _Place) -> dict[str, Any]:
    for name, value in says.items():
        if name in _NUMBERS:
            is_right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
        else:
            is_right = isinstance(value, _FORM_OF.get(name, object)) and (name not in _CHOICES or bool(value))
        if not is_right:
            raise UserError(f"{where}: {name!r} cannot be {json.dumps(value)[:40]}.")
    kind = says.get("type", "object" if "properties" in says else None)
    for alone in ("$ref", "anyOf", "const", "enum"):
        if alone in says:
            _refuse_others(says, {alone, "type"} if alone in ("const", "enum") else {alone}, where)
    if "anyOf" in says:
        return {"anyOf": [_checked(each, where.inner(f".anyOf[{at}]")) for at, each in enumerate(says["anyOf"])]}
    if "const" in says or "enum" in says:
        values = says["enum"] if "enum" in says else [says["const"]]
        found = [value for value in values if kind is None or _is_of(value, kind)]
        if not found:
            raise UserError(f"{where}: no value is of the type {json.dumps(kind)}.")
        return {"enum": found}
    if "$ref" in says:  # outlines-core 0.2 leaves out what more than three of them lead to
        return _checked(*where.referred(says["$ref"]))
    if not says:
        return {
            "anyOf": [{}]
        }  # in parentheses: alone, the alternatives of any value would break up what is around them
    if isinstance(kind, list) and kind:
        parts = [{k: v for k, v in says.items() if k in _KEYWORDS.get(one, ())} | {"type": one} for one in kind]
        _refuse_others(says, {"type"}.union(*parts), where)
        return {"anyOf": [_kept(part, where) for part in parts]}
    if not isinstance(kind, str) or kind not in _KEYWORDS:
        raise UserError(f'{where}: give a "type", one of {", ".join(_KEYWORDS)}; got {json.dumps(kind)}.')
    _refuse_others(says, {"type", *_KEYWORDS[kind]}, where)
    return _kept_of_type(says | {"type": kind}, where)


def _kept_of_type(says: dict[str, Any], where: _Place) -> dict[str, Any]:
    properties = says.get("properties", {})
    if lacking := set(says.get("required", ())) - set(properties):
        raise UserError(f"{where}: {sorted(lacking)[0]!r} is required, but not among the properties.")
    if "properties" in says:
        says["properties"] = {name: _checked(value, where.inner(f".{name}")) for name, value in properties.items()}
        says.pop("additionalProperties", None)
    elif isinstance(says.get("additionalProperties"), Mapping):
        says["additionalProperties"] = _checked(says["additionalProperties"], where.inner(".*"))
    if "items" in says:
        says["items"] = _checked(says["items"], where.inner("[]"))
    if "pattern" in says:
        _refuse_others(says, {"type", "pattern"}, where)
        says["pattern"] = f"^(?:{_unescaped(says['pattern'], where)})$"
    if "format" in says:
        _refuse_others(says, {"type", "format"}, where)
        if says["format"] not in _FORMATS:
            raise UserError(f"{where}: the format must be one of {', '.join(_FORMATS)}, not {says['format']!r}.")
        says["pattern"] = f"^(?:{_FORMATS[says.pop('format')]})$"
    return says


def _unescaped(pattern: str, where: _Place) -> str:
    """Returns a string's pattern without anchors, if its texts stand in JSON as they are."""
    language = Language(pattern, ByteVocabulary())
    used = [byte for byte in (*range(32), ord('"'), ord("\\")) if language.class_of[byte + 3] >= 0]
    if used:
        raise UserError(
            f"{where}: the pattern {pattern!r} allows the character {chr(used[0])!r}, which JSON escapes. Name the "
            "characters that it may have, such as [a-z ], in place of '.' or [^...]."
        )
    return language.pattern


def _refuse_others(says: Mapping[str, Any], known: set[str], where: _Place) -> None:
    if others := sorted(says.keys() - known):
        raise UserError(
            f"{where}: {others[0]!r} cannot be kept exactly here. Leave it out, or give a regular expression."
        )


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return any(_is_of(value, one) for one in kind)
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    if kind == "integer":
        return isinstance(value, int | float) and value == int(value)
    return isinstance(value, _TYPES.get(kind, ()))
