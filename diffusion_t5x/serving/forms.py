"""The form that a request gives its answer: JSON, or a regular expression."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_t5x.decoding.json_schema import any_object, pattern_of
from diffusion_t5x.serving.refusals import Refusal

_TEXT = {"type": "text"}


@dataclasses.dataclass(frozen=True)
class Form:
    """The form that a request asks for.

    Attributes:
      param: the field that asks for it.
      regex: a regular expression of whole texts; None if a schema is given.
      schema: a JSON schema; None if an expression is given.
    """

    param: str
    regex: str | None = None
    schema: Mapping[str, Any] | None = None

    def pattern(self) -> str:
        """Returns the regular expression of the form.

        Raises:
          UserError: the schema cannot be kept.
        """
        return pattern_of(self.schema, f"{self.param}'s schema") if self.regex is None else self.regex


def read(body: Mapping[str, Any]) -> Form | None:
    """Reads `response_format`, or vLLM's `structured_outputs`; None if an answer may be any text.

    Raises:
      Refusal: the field is wrong, or both are given.
    """
    found = [form for form in (_response_format(body), _structured_outputs(body)) if form is not None]
    if len(found) > 1:
        raise Refusal("Give response_format or structured_outputs, not both.", "structured_outputs")
    return found[0] if found else None


def _response_format(body: Mapping[str, Any]) -> Form | None:
    name = "response_format"
    given = body.get(name, _TEXT)
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Form(name, regex=any_object())
    if kind != "json_schema":
        raise Refusal('response_format must have the type "text", "json_object" or "json_schema".', name)
    held = given.get("json_schema")
    if not isinstance(held, dict) or not isinstance(held.get("schema"), dict):
        raise Refusal('response_format.json_schema must be an object with a "schema", an object.', name)
    return Form(name, schema=held["schema"])


def _structured_outputs(body: Mapping[str, Any]) -> Form | None:
    name = "structured_outputs"
    if (given := body.get(name)) is None:
        return None
    given = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
    if given.keys() == {"regex"} and isinstance(given["regex"], str):
        return Form(name, regex=given["regex"])
    if given.keys() == {"json"} and isinstance(given["json"], dict):
        return Form(name, schema=given["json"])
    raise Refusal('structured_outputs must be {"regex": a string} or {"json": a schema}.', name)
