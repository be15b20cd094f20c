"""Explains gin's errors in one message with their place, and suggests shipped gin files."""

import ast
import contextlib
import pathlib
import pkgutil
import re
import sys
import tokenize
import traceback
from collections.abc import Iterator, Sequence

from gin import config as gin_config  # gin offers no public way to list what is registered

from diffusion_t5x.command_line import gin_checks, gin_reading
from diffusion_t5x.command_line.gin_reading import shipped, shipped_text
from diffusion_t5x.errors import UserError, did_you_mean


@contextlib.contextmanager
def explained_errors(flag: str = "") -> Iterator[None]:
    """Context that turns gin's errors in a file, a text or the command line's `flag` into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(frame.f_code.co_name == "<module>" for frame in frames):
            raise  # a module that the file imports is broken: that needs its traceback
        # gin appends the places to the message, innermost first; the tokenizer's errors do not know their file.
        message, *places = str(error).strip('"').split("\n  In ")
        file, line = next(iter(re.findall(r'^file "(.+)", line (\d+)', places[0] if places else "")), ("", ""))
        if isinstance(error, SyntaxError | tokenize.TokenError):
            readers = [frame for frame in frames if frame.f_code.co_name == "parse_config_file"]
            file = readers[-1].f_locals["f"].name if readers else ""
            if isinstance(error, SyntaxError):
                message, line = f"{error.msg} In: {(error.text or '').strip()}", error.lineno
            else:
                message, (line, _) = ast.literal_eval(message)
        place = flag or (file and f"{file}:{line}")
        raise UserError(": ".join(filter(None, [place, _explanation(message, file)]))) from None


def _explanation(message: str, file: str) -> str:
    """Rewords gin's message for the author of the file or flag, with suggestions for misspelled names."""
    if match := re.match(r"Unable to open file: (.+)\. Searched config paths", message):
        name = match[1]
        return f"there is no gin file {name!r}.{did_you_mean(name, shipped())}"
    if match := re.match(r"Configurable '(.+)' doesn't have a parameter named '(.+)'\.", message):
        selector, name = match.groups()
        names = [
            parameter.name for parameter in gin_checks.parameters(gin_config._REGISTRY.get_match(selector).wrapped)
        ]
        return f"{selector} has no parameter {name!r}.{did_you_mean(name, names) or f' It has {names}.'}"
    if match := re.match(r"No configurable matching (?:reference )?'@?([\w./]+)", message):
        name = match[1].rpartition("/")[2]
        length = name.count(".") + 1
        mentioned = {".".join(selector.split(".")[-length:]) for selector, _ in gin_config._REGISTRY.items()}
        return f"no gin file that was read mentions {name!r}.{did_you_mean(name, mentioned)}"
    if match := re.match(r"'(.+)' was not provided by an import statement", message):
        text = pathlib.Path(file).read_text(encoding="utf-8") if file else ""
        imports = re.findall(r"^(?:from .+ )?import (?:.+ as )?(\w+)", text, re.MULTILINE)
        return f"{match[1]!r} is not imported in this file.{did_you_mean(match[1], imports)}"
    if match := re.match(r"Couldn't resolve selector .*<module '(.+)' from .+ has no attribute (.+)\.", message):
        return f"{match[1]} has no {match[2]!r}.{did_you_mean(match[2], dir(sys.modules[match[1]]))}"
    if match := re.match(r"No module named '(.+)'", message):
        package, _, name = match[1].rpartition(".")
        siblings = [info.name for info in pkgutil.iter_modules(getattr(sys.modules.get(package), "__path__", None))]
        return f"there is no module {match[1]!r}.{did_you_mean(name, siblings)}"
    return message


def not_set(names: Sequence[str]) -> str:
    """Returns a message that lists unset macros: how to set them by flag, and which shipped files set them."""
    of_a_size = [name for name in names if ".ModelConfig." in f".{name}"]
    flags = " ".join(f"--gin.{name}=..." for name in names if name not in of_a_size)
    hints = list(dict.fromkeys(filter(None, map(_shipped_values, names))))
    how = f"Set on the command line ({flags}) or in a gin file" if flags else "Add a gin file"
    return f"not set: {', '.join(names)}. {how}{''.join(hints)}."


def _shipped_values(name: str) -> str:
    """Returns the shipped gin files that set a macro (a model, an objective, …) or a parameter of the model."""
    if ".ModelConfig." in f".{name}":
        return "; the sizes of models are in --gin_file=sizes/tiny.gin, sizes/base.gin and others"
    if name == "DECODER" and (objective := _objective()):
        return f"; DECODER is set in decoding/{objective}.gin, which goes with the objective"
    if name == "MIXTURE_OR_TASK_NAME":
        return "; tasks over your own files are in tasks/local_jsonl.gin, local_text.gin, local_tsv.gin, local_chat.gin"
    files = [file for file in shipped() if re.search(rf"^{name} = @", shipped_text(file), re.MULTILINE)]
    return f"; {name} is set in {', '.join(files[:3])}" if files else ""


def _objective() -> str:
    """Returns the shipped file that set OBJECTIVE, if a decoder's file has the same name."""
    set_in = pathlib.Path(gin_reading.place(("OBJECTIVE", "gin.macro", "value")).file)
    return set_in.stem if f"decoding/{set_in.name}" in shipped("decoding") else ""
