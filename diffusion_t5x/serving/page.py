"""The page at the root of a server: asks the model, and shows the canvas as it is written.

Its script inserts what the model writes as text only, and its policy lets no other script run.
"""

import base64
import dataclasses
import hashlib
import json
import pathlib

import jinja2
import markupsafe

import diffusion_t5x

_FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of HTML, and the headers to send with it."""

    html: str
    headers: dict[str, str]


def render(
    name: str, decoder: str, is_chat: bool, length: int, needs_key: bool, sampling: dict[str, float | None]
) -> Page:
    """Returns the page.

    Args:
      name: the model's name.
      decoder: the decoder, as text.
      is_chat: hold a conversation; otherwise each prompt is on its own.
      length: number of tokens of an answer.
      needs_key: ask for an API key.
      sampling: settings of the decoder that a request may change, with their values.
    """
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    script_hash = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    html = environment.get_template("page.html").render(
        name=name,
        decoder=decoder,
        is_chat=is_chat,
        length=length,
        needs_key=needs_key,
        sampling=sampling,
        version=diffusion_t5x.__version__,
        settings=markupsafe.Markup(json.dumps({"model": name, "chat": is_chat}).replace("<", "\\u003c")),
        script=markupsafe.Markup(script),
    )
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors 'none'; script-src '{script_hash}'"
    )
    return Page(html, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})
