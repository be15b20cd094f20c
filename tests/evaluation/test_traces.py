"""Traces of decoding in records, in a page and in a terminal. Texts of models are never markup."""

import base64
import hashlib
import html.parser
import io
import json
import re

import numpy as np
import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from diffusion_t5x.decoding.decoder import Trace
from diffusion_t5x.evaluation import traces
from diffusion_t5x.reporting import trace_page

EVIL = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "\u2028\u2029'\"`${x}\\",
    "<img src=x onerror=alert(1)>&lt;",
    "\x1b[31m\x00é☃",
)


def cells(tokens):
    return [f"t{token}" for token in tokens]


def record(text="a", trace=None, **fields):
    trace = trace or {"tokens": [text, "▢"], "given": [0], "steps": [[[1, text, 0.25]], [[1, text, 0.5]]]}
    about = {"example_id": 0, "inputs_pretokenized": text, "prediction": text}
    return about | {"score": 0.5, "num_tokens": 1, "num_steps": 2, "trace": trace} | fields


@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 99))
def test_a_compact_trace_unfolds_to_every_step(steps, length, seed):
    rng = np.random.default_rng(seed)
    tokens, confidence = rng.integers(0, 3, (steps + 1, length)), rng.integers(0, 3, (steps + 1, length)) / 2.0
    confidence[0] = 0
    made = traces.compact(Trace(tokens, confidence), np.arange(length) > 0, steps, cells)
    made = json.loads(json.dumps(made))
    assert [list(zip(cells(row), p, strict=True)) for row, p in zip(tokens, confidence.tolist(), strict=True)] == [
        [tuple(token) for token in frame] for frame in traces.frames(made)
    ]
    assert made["given"] == [0] and len(made["steps"]) == steps
    assert traces.texts(made) == ["".join(cells(row)) for row in tokens]


def test_a_compact_trace_ends_with_its_own_last_step_and_tells_unlikely_from_unwritten():
    tokens = np.array([[3, 3], [4, 3], [4, 3], [4, 3]])
    confidence = np.array([[0, 0], [1e-9, 0], [1e-9, 0], [1e-9, 0]])
    made = traces.compact(Trace(tokens, confidence), np.array([True, False]), 2, cells)
    assert made == {"tokens": ["t3", "t3"], "given": [1], "steps": [[[0, "t4", 0.001]], []]}
    assert len(traces.compact(Trace(tokens, confidence), np.array([True, False]), 0, cells)["steps"]) == 1


class Page(html.parser.HTMLParser):
    """The elements of a page, and what stands in its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.mark.parametrize("text", EVIL)
def test_no_text_becomes_markup(text, tmp_path):
    path = tmp_path / "page.html"
    trace_page.write_trace_page(path, [record(text, targets_pretokenized=text)] * 2, 2, text, text)
    written = path.read_text(encoding="utf-8")
    page, plain = Page(written), Page(trace_page.render([], 0, "title", "decoder"))
    assert page.tags == plain.tags and page.tags.count("script") == 2
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    data, script = page.scripts
    (example, _) = json.loads(data)
    assert dict(example["texts"])["output"] == text and example["trace"]["tokens"][0] == text
    assert not re.search(r"[<\u2028\u2029]", data)
    (policy,) = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?:", script)


def test_the_page_has_so_many_examples_and_says_so(tmp_path):
    path = tmp_path / "page.html"
    many = (record(str(number)) for number in range(70))
    trace_page.write_trace_page(path, many, 70, "many", "SundaeDecoder()")
    text = path.read_text(encoding="utf-8")
    assert len(json.loads(Page(text).scripts[0])) == trace_page.MOST_EXAMPLES and "the first 50 of 70" in text
    assert [path] == list(tmp_path.iterdir())


def shown(*records, width=60, **settings):
    console = rich.console.Console(file=io.StringIO(), width=width, **settings)
    traces.show(records, console)
    return console.file.getvalue()


def test_the_terminal_shows_step_below_step():
    steps = [[[0, "the", 0.9]], [[1, " cat", 0.2]], [[1, " dog", 0.6]]]
    trace = {"tokens": ["▢", "▢", "."], "given": [2], "steps": steps}
    lines = shown(record(trace=trace)).splitlines()
    assert [line.strip() for line in lines[-4:]] == ["0 ▢▢.", "1 the▢.", "2 the cat.", "3 the dog."]
    steps += [[[0, "the", 0.95]], []]
    assert shown(record(trace=trace)).splitlines()[-1].strip() == "3–5 the dog."
    coloured = shown(record(trace=trace), force_terminal=True, color_system="truecolor").splitlines()[-1]
    assert re.search(r"38;2;0;135;135mthe\x1b", coloured)  # sure, and as it was
    assert re.search(r"\[4;38;2;95;135;0m dog\x1b", coloured)  # less sure, and new


def test_the_terminal_shows_some_of_many_steps_and_obeys_no_text():
    steps = [[[place, "x", 0.5]] for place in range(100)]
    out = shown(record(trace={"tokens": ["▢"] * 100, "given": [], "steps": steps}), width=40)
    numbers = [int(number) for number in re.findall(r"^ *(\d+) [x▢]", out, re.MULTILINE)]
    assert len(numbers) == 12 and (numbers[0], numbers[-1]) == (0, 100)
    assert all(len(line) <= 40 for line in out.splitlines())
    for text in EVIL:
        out = shown(record(f"[red]{text}[/red]"), width=200)
        assert "\x1b" not in out and "\x00" not in out and "[red]" in out
