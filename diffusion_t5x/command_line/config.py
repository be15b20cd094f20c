"""The interface to gin: flags, search paths, overrides, and a clear message for every gin mistake.

Besides this module, only its neighbours `gin_*` import gin. A verb is a plain function whose arguments gin fills in:

    def train(*, model: Transformer, train_steps: int, dry_run: bool = False): ...

    if __name__ == "__main__":
        config.run(train)

The flags are T5X's: `--gin_file` (repeatable, later wins), `--gin.NAME=VALUE`, `--gin_search_paths`, `--dry_run`.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
import os
import pathlib
import re
import sys
import tokenize
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import absl.logging
import gin
from gin import config as gin_config  # gin offers no public way to list what is registered and what is bound
from gin import config_parser

from diffusion_t5x import terminal, user_cache
from diffusion_t5x.command_line import gin_checks, gin_guard, gin_messages, gin_reading, processes, profiling
from diffusion_t5x.command_line.flags import parse_flags
from diffusion_t5x.command_line.gin_messages import explained_errors
from diffusion_t5x.command_line.gin_reading import AsText, shipped, shipped_text
from diffusion_t5x.errors import OtherModel, UserError
from diffusion_t5x.task_modules import registers_tasks

PACKAGE = pathlib.Path(__file__).parents[1]
# Strings that need no quotes on the command line: names and paths, as in --gin.MODEL_DIR=/tmp/model.
_BARE_STRING = re.compile(r"[A-Za-z_./~][\w./:~+-]*")
_MENTIONED = "_MENTIONED_ON_THE_COMMAND_LINE"  # a macro, for a moment
_MISSPELT_CONSTANTS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def run(
    main: Callable[..., Any],
    argv: Sequence[str] | None = None,
    subcommand: str = "",
    dry_run: object = None,
    texts: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Runs a verb as a `program`: reads the flags, resolves gin and calls `main` with the arguments that gin binds.

    Args:
      main: the verb's function. If it takes `dry_run`, it receives the flag of that name.
      argv: the command line without the program's name and the subcommand; by default that of this process.
      subcommand: the word before the flags, in a module with several verbs.
      dry_run: passed to `main` in place of the flag; None passes the flag.
      texts: gin to read before the files, see `load`.
    """
    with program():
        _run(_importable(main), sys.argv[1:] if argv is None else argv, subcommand, dry_run, texts)


@contextlib.contextmanager
def program() -> Iterator[None]:
    """Context in which every verb runs: quiet libraries, progress on stderr.

    A `UserError` ends the process with `error: ...` on stderr and status 2; any other exception keeps its traceback.
    If several processes work as one, a process that fails does not wait for the others.
    """
    with terminal.standard_streams(), _ended_by_errors():
        yield


@contextlib.contextmanager
def _ended_by_errors() -> Iterator[None]:
    _quiet_start()
    user_cache.keep_compiled()
    processes.in_32_bits()
    try:
        yield
        processes.leave()
    except SystemExit:
        processes.leave()
        raise
    except UserError as error:
        # gin appends to every exception the chain of configurables and files that it passed through.
        message, *_ = re.split(r"\n  In (?:call to configurable|file) ", str(error))
        message += _files_of(error.settings) if isinstance(error, OtherModel) else ""
        print(f"error: {terminal.safe(message)}", file=sys.stderr)
        processes.give_up(2)
        sys.exit(2)
    except BaseException:
        if processes.are_joined():
            traceback.print_exc()
            processes.give_up(1)
        raise


def load(
    gin_files: Iterable[str],
    bindings: Iterable[str] = (),
    search_paths: Iterable[str] = (),
    allowed: Sequence[str] = (),
    texts: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Replaces gin's configuration by that of `gin_files`, then `bindings` (`"NAME = VALUE"`); later ones win.

    `texts` come first: gin that nobody named on the command line, such as a checkpoint's, which may refer to less (see
    `gin_guard`). Their keys name them in messages.

    Run files, those in `gin/runs`, set defaults: any other file wins, before or after them. `%gin.REQUIRED` does not
    unset what an earlier one of `gin_files` set. A binding without scope replaces the bindings that files have for the
    same parameter in scopes.

    Files and their includes are looked up as given, in `search_paths`, beside the files of `gin_files`, then among the
    shipped ones: `runs/x.gin`, `gin/runs/x.gin` and `diffusion_t5x/gin/runs/x.gin` are the same file. They may import
    and name anything in `gin_guard.PACKAGES` and in the `allowed` packages or modules.

    Raises:
      UserError: a missing file, a name that does not exist or is not allowed, or a syntax error, with its place.
    """
    gin_guard.allow(allowed)
    gin_files = [os.path.expanduser(file) for file in gin_files]
    folders = [os.path.dirname(file) for file in gin_files]
    gin.clear_config()
    gin_reading.start()
    gin_config._LOCATION_PREFIXES[:] = map(
        str, ["", *search_paths, *folders, gin_reading.SHIPPED, PACKAGE, PACKAGE.parent]
    )
    gin.parse_config("from __gin__ import dynamic_registration")  # so that `operative_text` writes it, too
    for what, text in texts.items():
        with explained_errors(what), gin_reading.reading("text", what):
            gin.parse_config(text)
    for file in gin_files:
        with explained_errors(), gin_reading.reading("file", file):
            gin.parse_config_file(file)
    for binding in bindings:
        name, equals, value = (part.strip() for part in binding.partition("="))
        flag = f"--gin.{name}={value}" if equals else f"--gin_bindings={binding!r}"
        with explained_errors(flag), gin_reading.reading("flag", flag):
            gin.parse_config(f"{name} = {gin_value(name, value)}" if equals else binding)
    with explained_errors():
        gin_guard.check_references(allowed)
    gin_checks.check_macros_used()
    gin_checks.check_cycles()


def operative_text() -> str:
    """Returns the resolved configuration as gin text that can be loaded again: all bindings and all defaults.

    A default is written without scope, so it takes effect exactly where the code's own default would have. Defaults
    that are objects, such as `mesh = MeshConfig()`, cannot be written in gin and follow as comments.
    """
    bound = {key: dict(parameters) for key, parameters in gin_config._CONFIG.items()}
    mentioned = {selector: gin_config._REGISTRY[selector] for _, selector in bound}
    for reference in gin_config.iterate_references(gin_config._CONFIG):
        mentioned[reference.configurable.selector] = reference.configurable
    objects = []
    for selector, configurable in mentioned.items():
        unbound = {
            parameter.name: parameter.default
            for parameter in gin_checks.parameters(configurable.wrapped)
            if parameter.name not in bound.get(("", selector), {}) and parameter.name != "dry_run"
        }
        literal = bool | int | float | str | tuple | list | dict | None
        if defaults := {name: default for name, default in unbound.items() if isinstance(default, literal)}:
            bound["", selector] = defaults | bound.get(("", selector), {})
        name = f"{configurable.wrapped.__module__}.{configurable.wrapped.__qualname__}"
        objects += [f"# {name}.{key} = {value}" for key, value in unbound.items() if dataclasses.is_dataclass(value)]
    title = ["# Defaults that are objects:", f"# {'=' * 118}"] if objects else []
    return "\n".join([gin_config._config_str(bound, max_line_length=120), *title, *sorted(objects), ""])


def operative_values() -> dict[str, Any]:
    """Returns the bindings of `operative_text`, nested by the dots of their names; references are text ("%MODEL")."""
    values: dict[str, Any] = {}
    for statement in config_parser.ConfigParser(operative_text(), AsText()):
        if isinstance(statement, config_parser.BindingStatement):
            *parents, name = f"{statement.scope}/{statement.selector}.{statement.arg_name}".strip("/.").split(".")
            functools.reduce(lambda inner, key: inner.setdefault(key, {}), parents, values)[name] = statement.value
    return values


def registration(macro: str) -> dict[str, Any]:
    """Returns everything another program needs to bind a macro to the same value, as a JSON-serialisable dict.

    Returns:
      "imports": the modules it refers to, and those whose import may register tasks. "bindings": by full name
      (`scope/package.module.function.argument`; macros have no dot) the values, in which a reference is
      {"@": name, "call": bool} and a macro {"%": name}. {} where the macro is not bound.
    """
    if (macro, "gin.macro") not in gin_config._CONFIG:
        return {}
    bindings, wanted = {}, [(macro, "gin.macro")]
    modules = {x.module for x in gin_config._IMPORTS if registers_tasks(x.module)}
    while wanted:
        scope, selector = key = wanted.pop()
        configurable = gin_config._REGISTRY[selector].wrapped
        name = f"{configurable.__module__}.{configurable.__qualname__}"
        is_macro = configurable is gin_config.macro
        for parameter, value in gin_config._CONFIG.get(key, {}).items():
            full = scope if is_macro else f"{scope}/{name}.{parameter}".lstrip("/")
            if full in bindings:
                continue
            bindings[full] = _as_json(value)
            for reference in gin_config.iterate_references({parameter: value}):
                found = reference.configurable
                if found.wrapped is gin_config.macro:
                    wanted.append(("/".join(reference.scopes), "gin.macro"))
                else:
                    modules.add(found.wrapped.__module__)
                    wanted += [bound for bound in gin_config._CONFIG if bound[1] == found.selector]
    return {"imports": sorted(modules), "bindings": bindings}


def _as_json(value: Any) -> Any:
    if isinstance(value, gin_config.ConfigurableReference):
        target, scope = value.configurable.wrapped, "/".join(value.scopes)
        if target is gin_config.macro:
            return {"%": scope}
        name = f"{target.__module__}.{target.__qualname__}"
        return {"@": f"{scope}/{name}".lstrip("/"), "call": value.evaluate}
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return list(map(_as_json, value)) if isinstance(value, list | tuple) else value


def _run(
    main: Callable[..., Any], argv: Sequence[str], subcommand: str, dry_run: object, texts: Mapping[str, str]
) -> None:
    takes = inspect.signature(main).parameters
    takes_dry_run, takes_mesh = "dry_run" in takes, "mesh" in takes
    flags = parse_flags(main.__module__, argv, takes_dry_run, takes_mesh, subcommand)
    if takes_mesh:
        processes.join(flags)  # before a gin file imports what may look for devices
    if flags.tfds_data_dir:
        os.environ["TFDS_DATA_DIR"] = flags.tfds_data_dir
    if gin_config._inverse_lookup(main) is None:
        gin.register(main)
    own = main.__module__.partition(".")[0]  # a verb of another package may use that
    load(flags.gin_file, flags.gin_bindings, flags.gin_search_paths, [own, *flags.gin_allow], texts)
    selector = gin_config._inverse_lookup(main).selector
    gin_config._CONFIG.setdefault(("", selector), {})  # so that `operative_text` shows it where nothing is bound
    gin_checks.check_types(main)
    gin_checks.check_flags_used(main)
    gin_checks.check_files_used(main)
    if flags.print_config:
        print(operative_text())
    if missing := list(dict.fromkeys(gin_checks.unset(selector, [], {"dry_run"}))):
        first = "" if flags.gin_file else "no --gin_file was given (--help shows examples); "
        raise UserError(first + gin_messages.not_set(missing))
    gin_guard.check_buckets(gin_checks.reached(main))
    if flags.print_config:
        return
    with profiling.profiled(flags.profile, flags.profile_seconds):
        asked = dry_run or (takes_dry_run and flags.dry_run)
        bound = gin_config._CONFIG["", selector]  # a dry run that gin asks for is one without the flag, too
        passes = takes_dry_run and (asked or "dry_run" not in bound)
        gin.get_configurable(main)(**({"dry_run": asked} if passes else {}))


def _files_of(model: Mapping[str, Any]) -> str:
    """Returns the shipped size file that matches the fields of a ModelConfig."""
    for file in shipped("sizes"):
        parsed = config_parser.ConfigParser(shipped_text(file), AsText())
        bound = {x.arg_name: x.value for x in parsed if isinstance(x, config_parser.BindingStatement)}
        if all(model.get(name) == value for name, value in bound.items() if name in model) and "embed_dim" in model:
            return f" Its size is that of {file}."
    return ""


def _register(name: str) -> None:
    """Lets the command line name anything in the modules that gin files import, as the files could."""
    imports = {x.format() for x in gin_config._IMPORTS if x.bound_name() == name.partition(".")[0]}
    if "." in name and len(imports) == 1 and not gin_config._REGISTRY.matching_selectors(name):
        mentions = f"{_MENTIONED} = @{name}"
        gin.parse_config(["from __gin__ import dynamic_registration", *imports, mentions])
        del gin_config._CONFIG[_MENTIONED, "gin.macro"]


def gin_value(name: str, value: str) -> str:
    """Returns `value` if it is gin syntax, with what it refers to registered; quotes a bare name or path."""
    reader, is_value = AsText(), False
    with contextlib.suppress(SyntaxError, tokenize.TokenError):
        parser = config_parser.ConfigParser(value, reader)
        parser.parse_value()
        is_value = parser.current_token.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
    if is_value:
        for mentioned in reader.mentioned:
            _register(mentioned)
        return value
    if constant := _MISSPELT_CONSTANTS.get(value):
        raise UserError(f"--gin.{name}={value}: gin spells it {constant}.")
    if _BARE_STRING.fullmatch(value):
        return repr(os.path.expanduser(value))
    raise UserError(f"--gin.{name}={value}: not a gin value. Quote a string: --gin.{name}='\"{value}\"'")


def _importable(main: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `main` as gin files import it: `python -m` keeps another copy of it in `__main__`."""
    if main.__module__ != "__main__":
        return main
    script = sys.modules["__main__"]
    if script.__spec__:
        name = script.__spec__.name
    elif script.__file__ and pathlib.Path(script.__file__).resolve().parent == PACKAGE.resolve():
        name = f"{PACKAGE.name}.{pathlib.Path(script.__file__).stem}"
    else:
        return main
    return getattr(importlib.import_module(name), main.__name__)


class _SafeFormatter(logging.Formatter):
    """Log formatter that escapes control characters, so that a log line cannot control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal.safe(super().format(record))


class _Stderr(logging.StreamHandler):
    """Writes to the current `sys.stderr`."""

    def __init__(self):
        logging.Handler.__init__(self)
        self.setFormatter(_SafeFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))

    @property
    def stream(self):
        return sys.stderr


def _print_exception(kind: type[BaseException], error: BaseException, frames: types.TracebackType | None) -> None:
    """Prints a traceback with control characters escaped."""
    if sys.stderr:
        print(terminal.safe("".join(traceback.format_exception(kind, error, frames))), end="", file=sys.stderr)


def _quiet_start() -> None:
    """Sets up logging: our progress on stderr, one short line each, without the chatter of other libraries."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    absl.logging.set_verbosity(absl.logging.ERROR)
    logger = logging.getLogger("diffusion_t5x")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_exception
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
