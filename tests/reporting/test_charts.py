"""Charts: labels, colours and axes."""

import itertools
import re
import xml.etree.ElementTree

import pytest

from diffusion_t5x.reporting import charts, shown


def test_labels_at_the_ends_of_lines_do_not_cover_each_other():
    lines = [charts.Line(f"run{n}", n, [(0, 1.0), (10, 5 + 0.01 * n)]) for n in range(9)]
    svg = charts.line_chart("t", "step", "nats", lines)
    places = re.findall(r'<text [^>]*?y="([\d.]+)"[^>]*>(run\d)<', svg)
    heights = sorted(float(height) for height, _ in places)
    assert len(heights) == 9
    assert min(b - a for a, b in itertools.pairwise(heights)) > 11  # points; the font has 10
    assert min(heights) > 0 and max(heights) < 260


def test_a_label_stands_at_the_height_of_its_line_s_end():
    lines = [charts.Line(f"run{n}", n, [(0, 0.0), (10, end)]) for n, end in enumerate((50.0, 100.0))]
    svg = charts.line_chart("t", "step", "nats", lines)
    heights = {name: float(y) for y, name in re.findall(r'<text [^>]*?y="([\d.]+)"[^>]*>(run\d)<', svg)}
    # The axes are 192 points high and show 0 to 100 with a twentieth to spare at the top.
    assert heights["run0"] - heights["run1"] == pytest.approx(192 / 1.05 / 2, abs=1)


def test_a_chart_s_colours_are_the_page_s():
    svg = charts.line_chart("t", "x", "y", [charts.Line("$a_b$ <&", 1, [(0, float("nan")), (1, 2.0)])])
    assert "var(--series-1)" in svg and "currentColor" in svg and "var(--grid)" in svg
    assert not re.search(r"#0[123]000", svg) and "$a_b$ &lt;&amp;" in svg


def test_a_chart_of_its_own_brings_its_colours_and_rings_what_is_marked():
    lines = [charts.Line(f"run{n}", n, [(1, 1.0), (100, 5.0 + n)]) for n in range(charts.NUM_COLOURS)]
    plain, marked = (charts.line_chart("t", "x", "y", lines, marks=marks, log_x=True) for marks in ((), [(20, 3.0)]))
    assert marked.count("<use") == plain.count("<use") + 1
    assert "1</text>" in marked and ">20</text>" not in marked  # a mark has no tick
    svg = charts.standalone(marked)
    assert set(re.findall(r"var\((--[\w-]+)\)", svg)) <= set(re.findall(r"(--[\w-]+):", charts.PALETTE))
    assert xml.etree.ElementTree.fromstring(svg.encode()).tag.endswith("svg")


def ticks(svg):
    """The numbers on the axes of a chart."""
    return {float(text.replace("−", "-").replace(",", "")) for text in re.findall(r">([−\d.,-]+)</text>", svg)}


@pytest.mark.parametrize(
    ("metric", "values"), [("accuracy", (0.0, 0.9)), ("bleu", (0.0, 41.0)), ("pass@1", (3.0, 100.0))]
)
def test_the_axis_of_a_bounded_metric_runs_from_zero_to_its_bound(metric, values):
    low, high = shown.bounds(metric)
    line = charts.Line("run", 0, list(enumerate(values)), marker="o")
    svg = charts.line_chart("t", "step", "y", [line], y_bounds=shown.bounds(metric))
    y_axis = ticks(svg) - {0.0, 0.25, 0.5, 0.75, 1.0} | {low, high}
    assert min(ticks(svg)) == low and max(y_axis) == high
    rows = [("a", values[0], values[0], values[1]), ("b", values[1], values[0], values[1])]
    svg = charts.interval_chart(metric, "x", rows, bounds=shown.bounds(metric))
    assert min(ticks(svg)) == low and max(ticks(svg)) == high


def test_the_axis_of_what_is_never_negative_does_not_go_below_zero():
    svg = charts.line_chart("t", "step", "y", [charts.Line("run", 0, [(0, 0.01), (1, 5.0)])])
    assert min(ticks(svg)) == 0
    svg = charts.line_chart("t", "step", "y", [charts.Line("run", 0, [(0, -3.0), (1, 5.0)])])
    assert min(ticks(svg)) < 0
