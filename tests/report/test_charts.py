"""The charts: well-formed, inside their frames, true to their numbers, labels clear of each other, colours readable."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import HOSTILE

from qkit.report import charts
from qkit.report.charts import svg
from qkit.report.charts.roofline import reached

GB = 10**9
PARTS = (charts.Part("packed", HOSTILE, 40 * GB), charts.Part("kv", "cache", 3 * GB), charts.Part("base", "none", 0))
HELD = [charts.Held("card", PARTS, 78 * GB, 86 * GB, True), charts.Held("small", PARTS, 23 * GB, None, False),
        charts.Held("unknown", PARTS, None, None, None)]  # fmt: skip
CURVE = charts.Curve("series1", "card", ((1, 40.0, 30.0, 60.0), (8, 300.0, 200.0, 450.0)))
MEASURED = charts.Curve("series2", "m", ((512, 9.0, None, None), (2048, 8.0, None, None)))
SPOTS = [charts.Spot("batch 1", False, 4.0, 8e12, 6e12, 9e12), charts.Spot("prefill 8,192", True, 9000.0, 4e14)]
BILL = charts.Bill("series1", "card", 2900.0, 1300.0, 700.0, 5000.0)


def drawn() -> dict[str, svg.Markup]:
    return {
        "bars": charts.limited_bars(HELD),
        "many bars": charts.limited_bars(HELD * 10),
        "no bars": charts.limited_bars([]),
        "rates": charts.rates([(HOSTILE, 40.0, 30.0, 60.0), ("slow", 0.4, 0.1, 2.0)], "Decode"),
        "one rate": charts.rates([("card", 40.0, 40.0, 40.0)], "Decode"),
        "no rates": charts.rates([], "Decode"),
        "curve": charts.curves([CURVE], "Decode", "batch"),
        "measured": charts.curves([MEASURED], "Decode", "context"),
        "one point": charts.curves([charts.Curve("series1", "card", ((1, 40.0, 30.0, 60.0),))], "Decode", "batch"),
        "no curve": charts.curves([charts.Curve("series1", "card", ())], "Decode", "batch"),
        "roof": charts.roofline(3.35e12, 9.9e14, SPOTS, "predicted"),
        "half a roof": charts.roofline(4e10, None, SPOTS[:1], "measured"),
        "no roof": charts.roofline(4e10, None, [], "measured"),
        "bills": charts.bills([BILL], 1.5),
        "never": charts.bills([charts.Bill("series1", "card", 2900.0, 1300.0, None, None)], 0.2),
        "no hosted price": charts.bills([charts.Bill("series1", "card", 2900.0, 1300.0, None, None)], None),
        "many stairs": charts.bills([BILL, charts.Bill("series2", "slow", 10.0, 1.0, None, None)], 1.5),
        "free": charts.bills([charts.Bill("series1", "own", 0.0, 1300.0, 0.0, 0.0)], 1.5),
        "no bills": charts.bills([], 1.5),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(drawn()))
def test_a_chart_is_well_formed_inside_its_frame_and_says_its_numbers(name):
    root = ET.fromstring(str(drawn()[name]))
    _, _, width, height = map(float, root.get("viewBox").split())
    assert root.get("role") == "img" and len(root.get("aria-label")) > 10
    seen = 0
    for element in root.iter():
        for keys, limit in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
            for key in keys:
                if element.get(key) is not None:
                    assert -1 <= float(element.get(key)) <= limit + 1, ET.tostring(element)
        if element.get("d"):
            assert "nan" not in element.get("d") and "inf" not in element.get("d")
        for key in ("width", "height", "r"):
            assert float(element.get(key, 1)) > 0
        seen += 1
    assert seen > 2 or name.startswith("no ")


def test_bars_are_in_proportion_and_the_limit_stands_where_it_is():
    root = ET.fromstring(str(charts.limited_bars(HELD[:1])))
    rects = {e.get("class"): e for e in root.iter() if e.tag == "rect"}
    unit = float(rects["room"].get("width")) / (86 * GB)
    assert float(rects["fill-packed"].get("width")) + 1.5 == pytest.approx(40 * GB * unit, abs=0.2)
    assert float(rects["fill-kv"].get("x")) == pytest.approx(40 * GB * unit, abs=0.2)
    limit = next(e for e in root.iter() if e.get("class") == "limit")
    assert float(limit.get("x1")) == pytest.approx(78 * GB * unit, abs=0.2)
    assert "fill-base" not in rects
    label = root.get("aria-label")
    assert "43.0 GB, 78.0 GB usable of 86.0 GB: fits" in label and "cache 3.0 GB" in label


@pytest.mark.parametrize("usable", range(1, 90, 4))
def test_no_size_is_written_across_the_limit(usable):
    root = ET.fromstring(str(charts.limited_bars([charts.Held("card", PARTS[:1], usable * GB, 90 * GB, usable >= 40)])))
    at = float(next(e for e in root.iter() if e.get("class") == "limit").get("x1"))
    for e in root.iter():
        if e.get("class") == "on-fill":
            assert abs(float(e.get("x")) - at) > 26


def test_a_band_is_drawn_between_low_and_high():
    root = ET.fromstring(str(drawn()["curve"]))
    (band,) = [e for e in root.iter() if e.get("class") == "band-series1"]
    ys = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", band.get("d"))]
    dots = [float(e.get("cy")) for e in root.iter() if e.tag == "circle"]
    assert len(ys) == 4 and ys[0] < dots[0] < ys[3] and ys[1] < dots[1] < ys[2]
    assert "8: 300 (200 to 450)" in root.get("aria-label")
    assert "band" not in str(drawn()["measured"])


def test_stairs_rise_at_the_capacity_and_the_break_even_is_marked():
    root = ET.fromstring(str(drawn()["bills"]))
    (stairs,) = [e for e in root.iter() if e.get("class") == "curve-series1"]
    points = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", stairs.get("d"))]
    heights = sorted({y for _, y in points}, reverse=True)
    dot = next(e for e in root.iter() if e.tag == "circle")
    assert len(heights) == 3 and heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert float(dot.get("cy")) == pytest.approx(heights[0], abs=0.1)
    hosted = next(e for e in root.iter() if e.get("class") == "hosted")
    x1, x2, y1, y2 = (float(hosted.get(k)) for k in ("x1", "x2", "y1", "y2"))
    slope = (y2 - y1) / (x2 - x1)
    # 700 million at $1.5 are $1,050: less than the bill, so that this dot lies above the line.
    at = float(dot.get("cx"))
    assert (y1 + slope * (at - x1)) > float(dot.get("cy"))
    assert "cheaper than hosted from 700 million" in root.get("aria-label")


def test_the_break_even_lies_on_the_hosted_line():
    first = 2900 / 1.5
    root = ET.fromstring(str(charts.bills([charts.Bill("series1", "card", 2900.0, 3000.0, first, first)], 1.5)))
    dot, hosted = (
        next(e for e in root.iter() if e.tag == "circle"),
        next(e for e in root.iter() if e.get("class") == "hosted"),
    )
    x1, x2, y1, y2 = (float(hosted.get(k)) for k in ("x1", "x2", "y1", "y2"))
    assert float(dot.get("cy")) == pytest.approx(y1 + (y2 - y1) * (float(dot.get("cx")) - x1) / (x2 - x1), abs=0.3)


def test_the_roof_bends_where_the_ceilings_meet():
    root = ET.fromstring(str(drawn()["roof"]))
    (edge,) = [e for e in root.iter() if e.get("class") == "roof"]
    (_, y1), (x2, y2), (x3, y3) = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", edge.get("d"))]
    assert y2 == y3 and y1 > y2 and x3 > x2
    assert (
        reached(4.0, 8e12, 3.35e12, 9.9e14) == pytest.approx(8 / 13.4) and reached(1e4, 4.95e14, 3.35e12, 9.9e14) == 0.5
    )
    assert "60% of the roof" in root.get("aria-label")


NAMES = st.sampled_from(["a", "batch 12", "prefill 8,192", "a name that is rather long"])


@given(
    st.lists(st.tuples(NAMES, st.floats(50, 430), st.floats(30, 230)), min_size=1, max_size=6)
)  # fmt: skip
def test_labels_do_not_cover_each_other(points):
    """However near the points are: there is room above or below for six."""
    out = svg.beside(points, 10, 260)
    boxes = []
    for e in (ET.fromstring(each) for each in out if each.startswith("<text")):
        width, x, y = 8 * len(e.text), float(e.get("x")), float(e.get("y"))
        left = x if e.get("text-anchor") == "start" else x - width
        assert left >= -0.1 and left + width <= svg.WIDTH + 0.1 and 0 < y < 270
        boxes.append((left, y - 13, left + width, y + 2))
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[0] >= b[2] - 0.2 or b[0] >= a[2] - 0.2 or a[1] >= b[3] - 0.2 or b[1] >= a[3] - 0.2


@given(st.floats(0, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_few_and_inside(start, width):
    found = svg.ticks(start, start + width)
    assert len(found) <= 7 and all(start - 1e-6 * (start + width) <= t <= (start + width) * (1 + 1e-6) for t in found)


@given(st.floats(1e-6, 1e9), st.floats(1.001, 1e9), st.booleans())
def test_a_scale_keeps_what_is_drawn_in_its_frame(low, times, log):
    scale = svg.Scale(low, low * times, 50, 400, log)
    assert scale(low) == pytest.approx(50) and scale(low * times) == pytest.approx(400)
    assert scale(low * times * 10) == pytest.approx(400) and scale(-1.0) == pytest.approx(50)
    assert scale(low * times**0.5) == pytest.approx(225) or not log


STYLE = (Path(charts.__file__).parents[1] / "page.css").read_text()
TEXT = ("ink", "soft", "good", "bad")  # what is written, on what
FILLED = ("packed", "embeddings", "unquantized", "kv", "activations", "process", "base")


def palettes() -> dict[str, dict[str, str]]:
    found = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    light, dark, paper = ({k: v for k, v in re.findall(r"--([\w]+): (#[0-9a-f]{6})", each)} for each in found)
    return {"light": light, "dark": {**light, **dark}, "print": {**light, **paper}}


def contrast(a: str, b: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_stands_out_in_every_theme(theme):
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = palettes()[theme]
    for under in ("page", "panel"):
        assert all(contrast(colours[name], colours[under]) >= 4.5 for name in TEXT)
        assert all(contrast(colours[name], colours[under]) >= 3 for name in FILLED)
    assert all(contrast(colours["on"], colours[name]) >= 4.5 for name in FILLED)
    assert contrast(colours["ink"], colours["yes"]) >= 4.5 and contrast(colours["soft"], colours["no"]) >= 4.5


def test_every_theme_defines_what_the_others_do_and_every_class_is_styled():
    first, *others = (set(re.findall(r"--(\w+):", each)) for each in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL))
    assert all(each == first for each in others) and set(re.findall(r"var\(--(\w+)\)", STYLE)) <= first
    used = {css for each in drawn().values() for css in re.findall(r'class="([\w-]+)"', str(each))}
    assert {css for css in used if f".{css}" not in STYLE} <= {"chart", "label", "value"}
