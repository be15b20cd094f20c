"""Checks the shapes that annotations state at every call: the decorator for jaxtyping's import hook.

Only shapes and dtypes are checked: the tests let tables stand in for models, and mypy checks the rest. The arrays of a
struct are checked where a function takes or returns it, not where it is made: JAX also makes structs of shardings, and
of single rows.
"""

import functools
import types
import typing
from typing import Annotated, Any, Union

import flax.struct
import jaxtyping
from beartype import beartype
from beartype.door import is_bearable
from beartype.vale import Is

from diffusion_t5x.shapes import Array


def checked(function):
    """The function, which raises for wrong arrays; jaxtyping calls one for the arguments, then one for the result."""
    hints = {name: arrays_of(hint) for name, hint in function.__annotations__.items()}
    if hints.get("return", Any) is not Any:
        hints = {"return": hints["return"]}  # the arguments, whose axes it must have, are checked before
    if function.__name__ == "__init__" or all(hint is Any for hint in hints.values()):
        return function
    function.__annotations__ = hints
    return beartype(function)


def arrays_of(hint: Any) -> Any:
    """The part of an annotation that is about arrays; Any if there is none."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return hint.dtype[Array, hint.dim_str]  # on the device or on the host
    if isinstance(hint, type) and issubclass(hint, flax.struct.PyTreeNode):
        return Annotated[hint, Is[fits]]
    if typing.get_origin(hint) not in (tuple, Union, types.UnionType):
        return Any
    wholes = typing.get_args(hint)
    parts = [arrays_of(whole) for whole in wholes]
    if all(part is Any for part in parts):
        return Any
    if typing.get_origin(hint) is tuple:
        return tuple[tuple(parts)]
    kept = tuple(whole if part is Any else part for whole, part in zip(wholes, parts, strict=True))
    return Union[kept]  # noqa: UP007  (any number of them)


@functools.cache
def fields(struct: type) -> dict[str, Any]:
    return {name: arrays_of(hint) for name, hint in typing.get_type_hints(struct).items()}


def fits(struct: flax.struct.PyTreeNode) -> bool:
    """True if a struct's arrays have the shapes of its annotations, each axis one size; None may stand for any."""
    values = {name: getattr(struct, name) for name in fields(type(struct))}
    with jaxtyping.jaxtyped("context"):
        return all(value is None or is_bearable(value, fields(type(struct))[name]) for name, value in values.items())
