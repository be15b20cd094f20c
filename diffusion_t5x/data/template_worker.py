"""The process that runs chat templates, with limits on time and memory. Free of JAX and TensorFlow.

A template is somebody else's program. Jinja's sandbox keeps it from the machine, but not from looping or growing. So it
runs in a process of its own, which the kernel ends when it takes too much time or memory.

A request is a line of JSON, `{"template": text, "renders": [variables, ...]}`. So is the reply: `{"names": the
variables that the template reads, "texts": [{"text": ...} or {"error": ...}, ...]}`, or `{"error": ...}` for the whole
request.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

SECONDS = 3.0  # of CPU time for a request, a few renderings of one conversation
MEMORY = 1 << 30  # bytes of the whole process
_LONGEST = 1 << 26  # characters of a text
_LONGEST_ERROR = 300


class _Generation(jinja2.ext.Extension):
    """{% generation %}, with which some templates mark the assistant's words."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja has it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> jinja2.Environment:
    """Returns Jinja's environment, set up like `transformers`."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=16)
def _compile(text: str) -> tuple[jinja2.Template, list[str]]:
    """Returns a compiled template, and the variables that it reads."""
    environment = _environment()
    names = jinja2.meta.find_undeclared_variables(environment.parse(text))
    return environment.from_string(text), sorted(names)


def _render(template: jinja2.Template, variables: dict[str, Any]) -> dict[str, str]:
    try:
        text = template.render(**variables)
        if len(text) > _LONGEST:
            return {"error": f"it writes {len(text)} characters"}
        text.encode()
        return {"text": text}
    except Exception as error:  # a template can fail in any way
        return {"error": _say(error)}


def _say(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY >> 20} MiB of memory"
    return (str(error) or type(error).__name__)[:_LONGEST_ERROR]


def answer(template: str, renders: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the reply to a request."""
    try:
        compiled, names = _compile(template)
    except Exception as error:  # Jinja evaluates constants when it compiles
        return {"error": _say(error)}
    return {"names": names, "texts": [_render(compiled, variables) for variables in renders]}


def main() -> None:
    """Answers requests on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends this one, whatever code runs
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        reply = json.dumps(answer(**request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, file=replies, flush=True)
