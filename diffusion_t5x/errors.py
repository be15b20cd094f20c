"""Errors that the user can fix."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
    """Bad input: a name, a path, a shape, a checkpoint or data that does not fit.

    The message says what is wrong, where, and how to fix it. The verbs print it without a traceback and exit with
    status 2, so it is raised before the long work starts.
    """


class OtherModel(UserError):
    """Raised for a model that differs from a checkpoint's.

    Attributes:
      settings: the fields of the checkpoint's `ModelConfig`, by name.
    """

    def __init__(self, message: str, settings: Mapping[str, Any]):
        super().__init__(message)
        self.settings = settings


def check_choices(settings: object) -> None:
    """Raises a UserError if a dataclass field has a value that its `Literal` type does not list."""
    name = type(settings).__name__
    for field, kind in get_type_hints(type(settings)).items():
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if choices and (value := getattr(settings, field)) not in choices:
            raise UserError(f"{name}.{field} must be one of {', '.join(map(str, choices))}, not {value!r}.")


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Returns ` Did you mean 'x' or 'y'?` with the candidates closest to `name`; "" if none is close."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    close = [by_lower_case[match] for match in difflib.get_close_matches(name.lower(), by_lower_case, n=2, cutoff=0.75)]
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
