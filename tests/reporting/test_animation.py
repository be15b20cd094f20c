"""The moving picture of a canvas: what is seen at each step, and that model text stays text."""

import itertools
import json
import re
import xml.etree.ElementTree

import pytest

from diffusion_t5x.errors import UserError
from diffusion_t5x.reporting.animation import animate
from diffusion_t5x.reporting.report import write_report

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "</text><script>alert(1)</script>\x1b[31m"


def record(*frames, given=(), prediction="ab"):
    """A record of `infer --trace`, of canvases as lists of token texts; what changes has a probability."""
    steps = [
        [[place, now, 0.5] for place, (was, now) in enumerate(zip(before, after, strict=True)) if was != now]
        for before, after in itertools.pairwise(frames)
    ]
    trace = {"tokens": list(frames[0]), "given": list(given), "steps": steps}
    return {"inputs_pretokenized": "in <put>", "prediction": prediction, "trace": trace}


def seen(svg, step):
    """The texts that stand in the picture at a step, from left to right, by its own key frames."""
    tree = xml.etree.ElementTree.fromstring(svg)
    found = []
    for text in tree.iter(f"{SVG}text"):
        when = re.search(r"v(\d+)-(\d+)", text.get("style", ""))
        if not when or int(when[1]) <= step < int(when[2]):
            found.append((float(text.get("y")), float(text.get("x")), text.text))
    return [text for _, _, text in sorted(found)]


def test_each_step_shows_its_canvas_and_its_number():
    svg = animate(record(["x", "y", "z"], ["x", "b", "z"], ["a", "b", "z"], ["a", "b", "z"]))
    assert seen(svg, 0) == ["in <put>", "x", "y", "z", "step 0 of 2"]
    assert seen(svg, 1) == ["in <put>", "x", "b", "z", "step 1 of 2"]
    assert seen(svg, 2) == ["in <put>", "a", "b", "z", "step 2 of 2"]  # the third step changes nothing
    names = set(re.findall(r"animation-name: (v\d+-\d+)", svg))
    assert names and names == set(re.findall(r"@keyframes (v\d+-\d+)", svg))


def test_a_mask_is_an_empty_box_and_a_given_token_is_text_from_the_start():
    svg = animate(record(["▢", "is", "▢"], ["he", "is", "▢"], ["he", "is", "in"], given=[1]))
    assert seen(svg, 0) == ["in <put>", "is", "step 0 of 2"]
    assert seen(svg, 2) == ["in <put>", "he", "is", "in", "step 2 of 2"]
    assert svg.count("<rect") == 2 + 2  # two masks, two new tokens


def test_without_motion_the_last_step_stands():
    tree = xml.etree.ElementTree.fromstring(animate(record(["x"], ["y"], ["z"])))
    still = [text.text for text in tree.iter(f"{SVG}text") if text.get("opacity", "1") == "1"]
    assert still == ["in <put>", "z", "step 2 of 2"]


def test_model_text_is_text_and_nothing_is_fetched():
    svg = animate(record([EVIL, "b"], ["a", EVIL], prediction=EVIL))
    tree = xml.etree.ElementTree.fromstring(svg)
    assert {element.tag.removeprefix(SVG) for element in tree.iter()} == {"svg", "title", "style", "text", "rect"}
    assert "\x1b" not in svg and "url(" not in svg and "href" not in svg
    assert any("<script>" in (text or "") for text in seen(svg, 0))


def test_long_canvases_break_into_lines_within_the_picture():
    frames = [["▢"] * 90, ["word "] * 90]
    tree = xml.etree.ElementTree.fromstring(animate(record(*frames)))
    width, height = (float(tree.get(name)) for name in ("width", "height"))
    places = [(float(text.get("x")), float(text.get("y"))) for text in tree.iter(f"{SVG}text")]
    assert max(x for x, _ in places) < width and max(y for _, y in places) < height
    assert len({y for _, y in places}) > 5


def test_the_report_writes_it(tmp_path):
    traced = record(["x"], ["y"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a-test.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [traced, record(["x"], ["q"])])
    )
    (tmp_path / "run" / "a-test.settings.json").write_text('{"task": "a", "decoder": "D()"}')
    output = write_report([tmp_path / "run"], tmp_path / "canvas.svg", example=1)
    assert seen(output.read_text(encoding="utf-8"), 1) == ["in <put>", "q", "step 1 of 1"]
    write_report([tmp_path / "run"], output)  # its own file again
    with pytest.raises(UserError, match=r"--example=2: there are 2 traced examples"):
        write_report([tmp_path / "run"], output, example=2)
    (tmp_path / "run" / "a-test.jsonl").write_text(json.dumps(traced | {"trace": None}) + "\n")
    with pytest.raises(UserError, match="have no trace: run infer with --trace"):
        write_report([tmp_path / "run"], output)
