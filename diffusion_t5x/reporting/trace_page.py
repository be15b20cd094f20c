"""A self-contained HTML page that plays traces, token by token and step by step.

Model outputs are untrusted: they are in the page as JSON that cannot end its element, the script inserts them as text
only, and the page's policy lets no other script run.
"""

import base64
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
import markupsafe

import diffusion_t5x
from diffusion_t5x.records import write_text

MOST_EXAMPLES = 50
_FOLDER = pathlib.Path(__file__).parent


def write_trace_page(
    path: pathlib.Path, records: Iterable[Mapping[str, Any]], total: int, title: str, decoder: str
) -> None:
    """Writes the page about the first `MOST_EXAMPLES` records, atomically; an earlier page is replaced."""
    write_text(path, trace_page(records, total, title, decoder), errors="replace")


def trace_page(records: Iterable[Mapping[str, Any]], total: int, title: str, decoder: str) -> str:
    """Returns the page as HTML; the arguments are those of `write_trace_page`."""
    return render([_example(record) for record in itertools.islice(records, MOST_EXAMPLES)], total, title, decoder)


def render(examples: list[dict[str, Any]], total: int, title: str, decoder: str) -> str:
    """Returns the page with examples in the script's form: "name", "texts" (each with its role) and "trace"."""
    script = (_FOLDER / "trace_page.js").read_text(encoding="utf-8")
    # Plain ASCII, and no "<": neither the end of the element nor a line end of JavaScript's can be in it.
    data = json.dumps(examples, separators=(",", ":")).replace("<", "\\u003c")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("trace_page.html").render(
        title=title,
        decoder=decoder,
        counted=f"the first {len(examples)} of {total:,}" if len(examples) < total else f"of {total:,}",
        version=diffusion_t5x.__version__,
        data=markupsafe.Markup(data),
        script=markupsafe.Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _example(record: Mapping[str, Any]) -> dict[str, Any]:
    names = {"inputs_pretokenized": "input", "template": "template", "targets_pretokenized": "reference"}
    texts = {name: record.get(field) for field, name in names.items()}
    texts = {name: text for name, text in texts.items() if text}
    score = f"{record['score']:.3g}, {_count(record['num_tokens'], 'token')} in {_count(record['num_steps'], 'step')}"
    name = texts.get("template") or texts.get("input") or record["prediction"]
    return {
        "name": name[:80],
        "texts": [*texts.items(), ("output", record["prediction"]), ("score", score)],
        "trace": record["trace"],
    }
