"""Checks that a value fits the type annotation of its parameter, and describes in words what would fit.

Gin binds literals (numbers, text, lists, dicts) and references, which stand for objects that are not built yet. An
annotation that says nothing about either, such as a type variable, takes anything.
"""

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_t5x.errors import did_you_mean

_NONE = type(None)
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    _NONE: "None",
    object: "anything",
    collections.abc.Callable: "a function",
}
_LISTS = (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection, list)


class Misfit(Exception):
    """Raised for a value that does not fit; the message is advice, or empty.

    Attributes:
      binding: key and value of the macro with the misfit; None: the value itself does not fit.
    """

    binding: tuple[tuple[str, str, str], Any] | None = None


class WholeNumber(float):
    """A number written as 1e6 or 2e3: a float that may stand for a whole number."""


def hints(function_or_class: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations of a function's parameters, or those of a class's `__init__`, that can be evaluated."""
    function = inspect.unwrap(function_or_class.__init__ if inspect.isclass(function_or_class) else function_or_class)
    found: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            found |= typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}))
        except Exception:  # a name that is imported for type checkers only: what it means is not known here
            continue
    return found


def returned(function_or_class: Callable[..., Any]) -> Any:
    """Returns the return type of a function by its annotation; a class returns itself."""
    return function_or_class if inspect.isclass(function_or_class) else hints(function_or_class).get("return", Any)


def fit(value: Any, hint: Any, refer: Callable[[Any, Any], Any]) -> Any:
    """Returns the value as a parameter annotated with `hint` takes it.

    1e6 becomes an int, and a list a tuple, where one is expected.

    Args:
      value: a literal, maybe with references in it.
      hint: an evaluated annotation.
      refer: `(value, hint) -> value`, which fits references, and returns NotImplemented for all other values.

    Raises:
      Misfit: it does not fit.
    """
    hint = _plain(hint)
    found = refer(value, hint)
    if found is not NotImplemented:
        return found
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any or isinstance(hint, str | typing.TypeVar):
        return value
    if origin in (typing.Union, types.UnionType):
        return _fit_any(value, args, refer)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        texts = [choice for choice in args if isinstance(choice, str)]
        raise Misfit(did_you_mean(value, texts).strip() if isinstance(value, str) else "")
    if origin is tuple:
        return _fit_tuple(value, args, refer)
    if origin in _LISTS:
        if isinstance(value, list | tuple):
            return type(value)(fit(item, args[0] if args else Any, refer) for item in value)
        if isinstance(value, dict) and origin in _LISTS[1:3]:
            return value
        raise Misfit(f"Write [{value!r}]." if isinstance(value, str) else "")
    if origin in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
        if not isinstance(value, dict):
            raise Misfit('Write {"train": ' + repr(value) + "}." if isinstance(value, str) else "")
        of_key, of_value = args or (Any, Any)
        return {fit(key, of_key, refer): fit(item, of_value, refer) for key, item in value.items()}
    if isinstance(origin, type):
        return _fit_class(value, origin)
    return value


def plain_numbers(value: Any) -> Any:
    """Returns the value with floats for possible whole numbers, also inside lists, tuples and dicts."""
    if isinstance(value, WholeNumber):
        return float(value)
    if isinstance(value, dict):
        return {plain_numbers(key): plain_numbers(item) for key, item in value.items()}
    return type(value)(map(plain_numbers, value)) if type(value) in (list, tuple) else value


def fits_call(returns: Any, hint: Any) -> bool:
    """True unless a function's return type, or a class, contradicts the annotation."""
    hint, returns = _plain(hint), _plain(returns)
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any or returns is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits_call(returns, member) for member in args)
    if (of := typing.get_origin(returns)) in (typing.Union, types.UnionType):
        return any(fits_call(member, hint) for member in typing.get_args(returns))
    returns = of or returns
    if origin is typing.Literal:
        return returns in map(type, args)
    if not (isinstance(origin, type) and isinstance(returns, type)):
        return True
    if getattr(origin, "_is_protocol", False):
        return all(hasattr(returns, name) for name in _methods(origin))
    if origin is float and returns is int:
        return True
    # What is annotated as a base class may be the one that is expected.
    return issubclass(returns, origin) or (issubclass(origin, returns) and returns is not object)


def takes_functions(hint: Any) -> bool:
    """True if the annotation accepts a function or a class itself, not only the result of calling it."""
    hint = _plain(hint)
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return any(map(takes_functions, typing.get_args(hint)))
    return (
        not isinstance(origin, type) or origin in (type, object, collections.abc.Callable) or "__call__" in vars(origin)
    )


def words(hint: Any) -> str:
    """Returns the accepted values, in words."""
    hint = _plain(hint)
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(words, args)))
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"({', '.join(map(words, args))})"
    if origin is tuple or origin in _LISTS:
        return f"a list of {words(args[0])}" if args and args[0] is not Any else "a list"
    if origin in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
        return f"a dict {{{words(args[0])}: {words(args[1])}}}" if args else "a dict"
    name = getattr(origin, "__name__", str(origin))
    return _WORDS.get(origin) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _plain(hint: Any) -> Any:
    """Strips Annotated and NewType; None becomes its type."""
    while typing.get_origin(hint) is typing.Annotated or hasattr(hint, "__supertype__"):
        hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint.__supertype__
    return _NONE if hint is None else hint


def _fit_any(value: Any, members: Sequence[Any], refer: Callable[[Any, Any], Any]) -> Any:
    fitted, advice = [], []
    for member in members:
        try:
            fitted.append(fit(value, member, refer))
        except Misfit as misfit:
            advice.append(str(misfit))
    if not fitted:
        raise Misfit(next(filter(None, advice), ""))
    return next((found for found in fitted if found is value), fitted[0])


def _fit_tuple(value: Any, args: Sequence[Any], refer: Callable[[Any, Any], Any]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Misfit(f"Write ({value!r},)." if isinstance(value, str) else "")
    if not args:
        return tuple(value)
    of_items = [args[0]] * len(value) if args[-1] is Ellipsis else args
    if len(of_items) != len(value):
        raise Misfit(f"It has {len(value)} items.")
    return tuple(fit(item, of_item, refer) for item, of_item in zip(value, of_items, strict=True))


def _fit_class(value: Any, wanted: type) -> Any:
    if wanted is int and isinstance(value, WholeNumber):
        value = int(value)
    if wanted is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise Misfit("It does not fit into 64 bits.")
    if wanted is float and isinstance(value, float) and not math.isfinite(value):
        raise Misfit("It is too large.")
    if wanted is float and isinstance(value, WholeNumber):
        return float(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if getattr(wanted, "_is_protocol", False):  # a literal is none
        fits = not isinstance(value, int | float | str | list | tuple | dict | None)
    else:
        fits = isinstance(value, wanted) and not (isinstance(value, bool) and wanted in (int, float))
    if fits:
        return value
    raise Misfit(_advice(value, wanted))


def _advice(value: Any, wanted: type) -> str:
    if wanted is str and isinstance(value, int | float):
        return f"Quote it: '\"{value}\"'."
    if wanted is int and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    if wanted in (int, float) and isinstance(value, str) and value.strip().lstrip("+-").replace(".", "", 1).isdigit():
        return "Write it without quotes."
    return ""


def _methods(protocol: type) -> set[str]:
    """Returns the methods that a protocol requires."""
    bases = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    return {
        name
        for base in bases
        for name, member in vars(base).items()
        if callable(member) and (not name.startswith("_") or name == "__call__")
    }


def shortened(value: Any) -> str:
    """Returns a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
