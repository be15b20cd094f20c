"""Checks a configuration after it is read and before anything is built: types, cycles, unused bindings."""

import inspect
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import gin
from gin import config as gin_config  # gin offers no public way to list what is registered and what is bound

from diffusion_t5x.command_line import gin_reading
from diffusion_t5x.command_line.setting_types import (
    Misfit,
    fit,
    fits_call,
    hints,
    plain_numbers,
    returned,
    shortened,
    takes_functions,
    words,
)
from diffusion_t5x.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

_MACRO = "gin.macro"
_TASK_MODULE = "MIXTURE_OR_TASK_MODULE"  # of T5X


def parameters(function_or_class: Callable[..., Any]) -> list[inspect.Parameter]:
    """Returns the parameters that gin can bind by name."""
    is_class = inspect.isclass(function_or_class)
    found = inspect.signature(function_or_class.__init__ if is_class else function_or_class).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter for parameter in list(found)[is_class:] if parameter.kind in by_name]


def name_of(scope: str, selector: str, parameter: str) -> str:
    """Returns a binding's name as gin files and flags spell it."""
    if selector == _MACRO:
        return scope
    if (scope, _MACRO) in gin_config._CONFIG:
        scope = ""  # what a macro refers to is called in a scope of the macro's name
    return "/".join([*filter(None, [scope]), ".".join(selector.split(".")[-2:])]) + f".{parameter}"


def check_cycles() -> None:
    """Raises a UserError for circular macros."""
    values = {scope: bound for (scope, selector), bound in gin_config._CONFIG.items() if selector == _MACRO}

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circle = [*path[path.index(name) :], name]
            place = gin_reading.place((path[-1], _MACRO, "value"))
            raise UserError(f"{place}: {' = %'.join(circle)} is circular. Set one of them to a value.")
        if name not in done:
            for reference in gin_config.iterate_references(values.get(name, {})):
                if reference.configurable.wrapped is gin_config.macro:
                    visit("/".join(reference.scopes), [*path, name])
            done.add(name)

    done: set[str] = set()
    for name in values:
        visit(name, [])


def check_types(verb: Callable[..., Any]) -> None:
    """Checks all values that a run of the verb uses against the type annotations of their parameters.

    A float such as 1e6 becomes an int where one is expected.

    Raises:
      UserError: a value that does not fit, with its place and what would fit.
    """
    in_use = reached(verb)
    for (scope, selector), bound in list(gin_config._CONFIG.items()):
        if selector.startswith("gin.") or not any(_applies(scope, found) for name, found in in_use if name == selector):
            continue
        wrapped = gin_config._REGISTRY[selector].wrapped
        annotations = hints(wrapped)
        defaults = {parameter.name: parameter.default for parameter in parameters(wrapped)}
        for name in bound:
            if name in annotations:
                key = (scope, selector, name)
                bound[name] = _fitted(key, bound[name], annotations[name], defaults.get(name, inspect.Parameter.empty))
    for bound in gin_config._CONFIG.values():
        bound.update({name: plain_numbers(value) for name, value in bound.items()})


def _applies(scope: str, called_in: str) -> bool:
    """True if a binding in one scope applies to a call in another scope."""
    return not scope or f"{called_in}/".startswith(f"{scope}/")


def _fitted(key: gin_reading.Key, value: Any, hint: Any, default: Any) -> Any:
    """Returns the value of a binding, converted to what its annotation says."""

    def refer(value: Any, hint: Any) -> Any:
        if not isinstance(value, gin_config.ConfigurableReference):
            return NotImplemented
        wrapped = value.configurable.wrapped
        if wrapped is gin_config.macro:
            _fit_macro("/".join(value.scopes), hint, refer)
        elif wrapped in (gin_config._retrieve_constant, gin_config.singleton):
            pass  # anything
        elif value.evaluate:
            if not fits_call(returned(wrapped), hint):
                spelled = repr(value)
                raise Misfit(f"Write {spelled.removesuffix('()')}, without ()." if takes_functions(hint) else "")
        elif not takes_functions(hint):
            raise Misfit(f"Write {value!r}() for what it returns." if fits_call(returned(wrapped), hint) else "")
        return value

    try:
        return fit(value, hint, refer)
    except Misfit as misfit:
        last, found = misfit.binding or (key, value)
        if type(found) is type(default) and found == default:
            return value  # it is what the code has, whatever the annotation says
        place = gin_reading.place(last)
        here = "" if place.kind == "flag" else f"{name_of(*last)} = {shortened(found)}: "
        wanted = f"{name_of('', *key[1:])} must be {words(hint)}, not {shortened(found)}."
        raise UserError(f"{place}: {here}{wanted} {misfit}".rstrip()) from None


def _fit_macro(name: str, hint: Any, refer: Callable[[Any, Any], Any]) -> None:
    """Checks and converts the value of a macro; a macro without a value is reported elsewhere."""
    bound = gin_config._CONFIG.get((name, _MACRO), {})
    if "value" not in bound:
        return
    try:
        bound["value"] = fit(bound["value"], hint, refer)
    except Misfit as misfit:
        misfit.binding = misfit.binding or ((name, _MACRO, "value"), bound["value"])
        raise


def check_macros_used() -> None:
    """Raises a UserError if a flag sets a macro that nothing uses, or if anything sets a macro that only T5X has."""
    used = set()
    for reference in gin_config.iterate_references(gin_config._CONFIG):
        if reference.configurable.wrapped is gin_config.macro:
            used.add("/".join(reference.scopes))
    modules = gin_config._CONFIG.get((_TASK_MODULE, _MACRO), {}).get("value")
    if modules is not None and _TASK_MODULE not in used:
        module = modules if isinstance(modules, str) else "my.tasks"
        raise UserError(
            f"{gin_reading.place((_TASK_MODULE, _MACRO, 'value'))}: here a gin file imports the module of a task, as "
            f"tasks/quickstart.gin does: a file with the line `import {module}`, and "
            f"--gin_allow={module.partition('.')[0]}. Leave {_TASK_MODULE} out."
        )
    for (scope, selector, _), flag in gin_reading.set_by_flags().items():
        if selector == _MACRO and scope not in used:
            with_it = [
                file
                for file in [*gin_reading.shipped("runs"), *gin_reading.shipped()]
                if re.search(rf"^{re.escape(scope)} = ", gin_reading.shipped_text(file), re.MULTILINE)
            ]
            hint = did_you_mean(scope, used) or (
                f" It is used by {', '.join(list(dict.fromkeys(with_it))[:3])}." if with_it else ""
            )
            raise UserError(f"{flag}: nothing in this configuration uses a macro {scope!r}.{hint}")


def reached(verb: Callable[..., Any]) -> set[tuple[str, str]]:
    """Returns selectors and scopes that a call of a verb, or of another configured one, would evaluate."""
    found = set()
    folder = verb.__module__.rpartition(".")[0]
    for _, selector in list(gin_config._CONFIG):
        wrapped = gin_config._REGISTRY[selector].wrapped
        # The settings of other verbs may be there, too: inspect_data shows what train reads.
        if wrapped is verb or (inspect.isfunction(wrapped) and wrapped.__module__.rpartition(".")[0] == folder):
            seen: set[tuple[Any, ...]] = set()
            list(unset(selector, [], set(), seen=seen))
            found |= {(visited, "/".join(scope)) for visited, _, *scope in seen}
    return found


def _replaced(in_use: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """Returns selectors and scopes that would also be evaluated if no flag had replaced what files set."""
    seen: set[tuple[Any, ...]] = set()
    for (scope, selector, name), value in gin_reading.replaced_by_flags().items():
        called_in = [found for other, found in in_use if other == selector and _applies(scope, found)]
        for reference in gin_config.iterate_references({name: value}) if called_in else ():
            scopes = reference.scopes or list(filter(None, called_in[0].split("/")))
            list(unset(reference.configurable.selector, scopes, set(), reference.evaluate, seen))
    return {(visited, "/".join(scope)) for visited, _, *scope in seen}


def check_flags_used(verb: Callable[..., Any]) -> None:
    """Raises a UserError if a flag sets a macro or parameter that a run of the verb does not use.

    Settings that another flag took out of use, as `--gin.train.train.decode_evals=[]` does with a decoder's, are only
    logged: a command line with all settings of a run may switch a part of it off.
    """
    in_use = reached(verb)
    switched_off = _replaced(in_use)
    for (scope, selector, parameter), flag in gin_reading.set_by_flags().items():
        scopes = [found for other, found in in_use if other == selector]
        if any(_applies(scope, found) for found in scopes):
            continue
        if any(other == selector and _applies(scope, found) for other, found in switched_off):
            logger.info(
                "%s changes nothing: another flag replaces what uses %s", flag, name_of(scope, selector, parameter)
            )
            continue
        if selector == _MACRO:
            users = sorted({name_of(*key) for key in _users(scope)})
            raise UserError(
                f"{flag}: it would change nothing: only {', '.join(users)} uses {scope}, and is not used itself."
            )
        name = ".".join(selector.split(".")[-2:])
        if scopes:
            known = " and ".join(name_of(found, selector, "")[:-1] for found in sorted(set(scopes)))
            raise UserError(f"{flag}: it would change nothing: this configuration uses {known}, not {scope}/{name}.")
        raise UserError(
            f"{flag}: it would change nothing: this configuration does not use {name}. Include the gin file that does, "
            "or see --print_config for what is used."
        )


def check_files_used(verb: Callable[..., Any]) -> None:
    """Raises a UserError if the command line names a gin file that only adapts objectives, and none that the run uses.

    Other files may set what goes unused: commands name the decoder's file in training, and the objective's in decoding.
    """
    in_use = reached(verb)
    used, macros, unused = set(), dict[str, set[str]](), dict[str, list[gin_reading.Key]]()
    for key, found in gin_reading.set_by_files().items():
        scope, selector, _ = key
        if any(other == selector and _applies(scope, other_scope) for other, other_scope in in_use):
            if selector == _MACRO:
                macros.setdefault(found.given, set()).add(scope)
            else:
                used.add(found.given)
        elif selector != _MACRO:
            used |= set() if _is_objective(selector) else {found.given}
            unused.setdefault(found.given, []).append(key)
    # The block size of adaptation/block_growth.gin is part of its stages: that a run has one does not make it use them.
    used |= {file for file, set_there in macros.items() if set_there - _needed(unused.get(file, []))}
    objectives = [selector.rpartition(".")[2] for selector, _ in in_use if _is_objective(selector)]
    for file in unused.keys() - used if objectives else ():
        names, objective = ", ".join(name_of(*key) for key in unused[file]), " with ".join(dict.fromkeys(objectives))
        raise UserError(
            f"--gin_file={file}: it would change nothing: it sets {names}, and this run's objective is {objective}. "
            "Leave the file out, or choose an objective that it adapts."
        )


def _is_objective(selector: str) -> bool:
    module = sys.modules.get("diffusion_t5x.objectives.objective")  # whoever names an objective has imported it
    return module is not None and module.Objective in getattr(gin_config._REGISTRY[selector].wrapped, "__mro__", ())


def _needed(keys: Collection[gin_reading.Key]) -> set[str]:
    """Returns the macros that the values of bindings refer to, and those that these refer to."""
    needed = set[str]()
    values = [gin_config._CONFIG.get((scope, selector), {}).get(name) for scope, selector, name in keys]
    while values:
        for reference in gin_config.iterate_references({"value": values.pop()}):
            macro = "/".join(reference.scopes)
            if reference.configurable.wrapped is gin_config.macro and macro not in needed:
                needed.add(macro)
                values.append(gin_config._CONFIG.get((macro, _MACRO), {}).get("value"))
    return needed


def _users(macro: str) -> Iterator[gin_reading.Key]:
    """Yields the bindings that refer to a macro."""
    for (scope, selector), bound in gin_config._CONFIG.items():
        for name, value in bound.items():
            for reference in gin_config.iterate_references({name: value}):
                if reference.config_key == (macro, _MACRO):
                    yield scope, selector, name


def unset(
    selector: str, scope: Sequence[str], given: Collection[str], called: bool = True, seen: set[Any] | None = None
) -> Iterator[str]:
    """Yields names without a value that a call of `selector` in `scope` with the `given` arguments would evaluate.

    Adds to `seen` what it visits: selector, True if it is called, and its scopes.
    """
    seen = set() if seen is None else seen
    if (visit := (selector, called, *scope)) in seen:
        return
    seen.add(visit)
    configurable = gin_config._REGISTRY[selector]
    with gin.config_scope(list(scope)):
        bound = gin.get_bindings(selector, resolve_references=False)

    if called:
        for parameter in parameters(configurable.wrapped):
            if parameter.default is parameter.empty and parameter.name not in {*given, *bound}:
                yield name_of("/".join(scope), selector, parameter.name)
    for name, value in bound.items():
        for reference in gin_config.iterate_references({name: value}):
            if repr(reference) == "%gin.REQUIRED":
                yield name_of("/".join(scope), selector, name)
            else:
                next_scope = reference.scopes or scope
                yield from unset(reference.configurable.selector, next_scope, set(), reference.evaluate, seen)
