"""Reports of several models, of models that were not timed, scored or measured at all, and the frontier's chart."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import xml.etree.ElementTree as ET

import pytest
from pages import Page, bodies
from reports import HOSTILE, make

from qkit.measure.types import Failed
from qkit.report import charts, tables, wording
from qkit.report import write as report
from qkit.report.charts import svg


def several(count=3, baseline=True, **changes):
    """A profile of models "m0", "m1", ...: each larger, closer to the baseline and slower than the one before."""
    result = make(baseline=baseline)
    rows = []
    for i in range(count):
        row = make(baseline=baseline, kld=0.2 / (i + 1)).models[0]
        times = tuple(dataclasses.replace(s, generate_tps=60.0 / (i + 1)) for s in row.speed)
        rows.append(
            dataclasses.replace(
                row, name=f"/some/where/m{i}", stored_bytes=10**6 * (i + 1), speed=times, faster=2.0 / (i + 1),
                on_frontier=(i != 1) if baseline else None, schemes={"int4": 7}, kernels={"k": 7},
            )
        )  # fmt: skip
    return dataclasses.replace(result, models=tuple(rows), **changes)


def test_the_first_screen_names_whose_each_figure_is():
    result = several()
    top = {card["title"]: (card["value"], card["note"]) for card in wording.cards(result)}
    assert top["Smallest on disk"][0] == "1.0 MB" and top["Smallest on disk"][1].startswith(
        "m0, 75% smaller than 4.0 MB"
    )
    assert top["Lowest KL divergence"] == ("0.0667", "m2, ± 0.0010")
    assert top["Highest top-1 agreement"][1].startswith("m0")
    assert top["Fastest generate, batch 1"][0] == "60.0 tok/s"
    assert top["Fastest generate, batch 1"][1].startswith("m0, 2.00x the baseline's 30.0")
    assert wording.title(result) == "3 models against model"
    said = "m0 and m2 are worth choosing from; m1 is beaten by another that is as small, as close to the baseline and"
    assert wording.verdict(result).startswith(said)
    unbeaten = dataclasses.replace(result, models=(result.models[0], result.models[2]))
    assert "none of them is beaten" in wording.verdict(unbeaten)


def test_side_by_side():
    head, lines = tables.candidates(several())
    cells = [dict(zip(head, line, strict=True)) for line in lines]
    assert [c[""] for c in cells] == ["m0", "m1", "m2", "baseline"]
    assert [c["frontier"] for c in cells] == ["yes", "no", "yes", "-"]
    assert [c["x the baseline's"] for c in cells][:3] == ["2.00", "1.00", "0.67"]
    assert cells[1]["mean KL divergence"] == "0.1000 ± 0.0010" and cells[3]["mean KL divergence"] == "-"
    head, lines = tables.candidates(several(baseline=False))
    assert "frontier" not in head and "mean KL divergence" not in head and len(lines) == 3
    head, lines = tables.quality(several())
    assert [line[0] for line in lines] == [f"m{i}, {p}" for i in range(3) for p in ("llama.cpp", "full")]
    assert {len(line) for line in lines} == {len(head)}


@pytest.mark.parametrize("baseline", [True, False])
def test_every_body_of_several_is_whole(baseline):
    result = several(baseline=baseline)
    page = report.to_html(result)
    parsed = Page(page)
    svgs = [a["aria-label"] for tag, a in parsed.tags if tag == "svg"]
    assert len(svgs) == (3 if baseline else 2) and any(s.startswith("KL divergence, log") for s in svgs) is baseline
    assert "://" not in page and "src=" not in page
    for body in bodies(result).values():
        assert all(f"m{i}" in body for i in range(3))
        assert ("frontier" in body) is baseline
    folded = "".join(re.findall(r"<details>(.*?)</details>", page, re.DOTALL))
    assert all(f"fingerprint of m{i}" in folded for i in range(3))
    assert len(json.loads(report.to_json(result))["models"]) == 3


def test_models_of_one_folder_s_name_are_told_apart():
    result = several(2)
    rows = [dataclasses.replace(row, name=f"/{i}/same") for i, row in enumerate(result.models)]
    assert tables.heads(dataclasses.replace(result, models=tuple(rows))) == ["/0/same", "/1/same", "baseline"]


def test_what_failed_is_named_everywhere():
    result = several(2, failed=(Failed(f"/x/{HOSTILE}", "the checkpoint lacks a tensor"),))
    result = dataclasses.replace(result, failures=result.problems)
    assert not result.passed and wording.title(result) == "3 models against model"
    for body in bodies(result).values():
        assert "Failed: " in body and "the checkpoint lacks a tensor" in body
    assert tables.candidates(result)[1][-1][1] == "failed"
    Page(report.to_html(result))
    one = dataclasses.replace(result, models=result.models[:1])
    for body in bodies(one).values():
        assert "the checkpoint lacks a tensor" in body


def test_what_was_not_timed_says_why():
    result = make()
    row = dataclasses.replace(
        result.models[0], loaded=False, speed=(), speed_how="not timed: it does not fit", faster=None
    )
    result = dataclasses.replace(result, models=(row,))
    assert wording.cards(result)[-1] == {
        "title": "Generate",
        "value": "not timed",
        "note": "not timed: it does not fit",
    }
    assert wording.verdict(result).endswith("of the time. Speed was not compared: not timed: it does not fit.")
    for body in bodies(result).values():
        assert "not timed: it does not fit" in body
    neither = dataclasses.replace(result, baseline=dataclasses.replace(result.baseline, speed=()))
    assert tables.speed(neither) is None and "Time per output token" not in report.to_html(neither)
    for body in bodies(neither).values():
        assert "TTFT" not in body.split("How each figure")[0]
    base = dataclasses.replace(make().baseline, speed=(), speed_how="not timed: too large")
    slow = dataclasses.replace(make(), baseline=base)
    slow = dataclasses.replace(slow, models=(dataclasses.replace(slow.models[0], faster=None),))
    assert wording.verdict(slow).endswith("Speed was not compared: not timed: too large.")
    assert "the baseline's" not in wording.cards(slow)[-1]["note"]
    alone = dataclasses.replace(result, baseline=None)
    assert "not timed: it does not fit" in wording.verdict(dataclasses.replace(alone))


def test_what_was_not_scored_says_why():
    result = make()
    row = dataclasses.replace(result.models[0], quality=None, on_frontier=None, problems=("quality: not finite",))
    result = dataclasses.replace(result, models=(row,))
    result = dataclasses.replace(result, failures=result.problems)
    assert tables.quality(result) is None and tables.percentiles(row) is None
    for body in bodies(result).values():
        assert "Failed: model: quality: not finite" in body
    assert "percentiles" not in report.to_html(result).lower().split("<details")[0]
    mixed = several(2)
    mixed = dataclasses.replace(mixed, models=(mixed.models[0], dataclasses.replace(row, name="/x/bad")))
    assert [line[0] for line in tables.quality(mixed)[1]] == ["m0, llama.cpp", "m0, full"]
    Page(report.to_html(mixed))


def marks(*given):
    return [
        charts.Mark(f"model number {i}", nbytes, kld, kld / 20, i % 2 == 0) for i, (nbytes, kld) in enumerate(given)
    ]


@pytest.mark.parametrize("given", [
    [(10**9, 0.1), (2 * 10**9, 0.01)], [(10**9, 0.1), (10**9, 0.1)], [(10**9, 0.0), (2 * 10**9, 0.2)],
    [(5, 1e-9), (70 * 10**9, 12.0)], [(10**9, 1.0), (10**9, 10.0)],
])  # fmt: skip
def test_the_frontier_is_well_formed(given):
    root = ET.fromstring(str(charts.frontier(marks(*given))))
    height = float(root.get("viewBox").split()[3])
    for element in root.iter():
        for key, most in (("x", svg.WIDTH), ("x1", svg.WIDTH), ("x2", svg.WIDTH), ("cx", svg.WIDTH)):
            assert 0 <= float(element.get(key, 0)) <= most
        for key in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(key, 0)) <= height
    circles = [e for e in root.iter() if e.tag == "circle"]
    assert [c.get("class") for c in circles] == ["fill-packed", "hollow"]
    assert all(c[0].text.startswith("model number") for c in circles)
    assert "model number 1" in root.get("aria-label")


def test_a_frontier_of_zeros_and_hostile_names():
    assert "exactly" in charts.frontier([charts.Mark("a", 1, 0.0, 0.0, True)])
    ET.fromstring(str(charts.frontier([charts.Mark(HOSTILE, 5, 0.1, 0.0, True), charts.Mark("b", 6, 0.2, 0.1, False)])))


def test_a_frontier_goes_down_to_the_right():
    root = ET.fromstring(str(charts.frontier(marks((10**9, 0.1), (2 * 10**9, 0.01)))))
    one, two = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter() if c.tag == "circle"]
    assert one[0] < two[0] and one[1] < two[1]


@pytest.mark.parametrize("seed", range(8))
def test_labels_meet_neither_each_other_nor_a_point(seed):
    chance = random.Random(seed)
    points = [(chance.uniform(1, 8) * 1e9, 10 ** chance.uniform(-1.5, -0.5)) for _ in range(7)]
    root = ET.fromstring(str(charts.frontier(marks(*points))))
    boxes = [(float(c.get("cx")) - 5, float(c.get("cy")) - 5, float(c.get("cx")) + 5, float(c.get("cy")) + 5)
             for c in root.iter() if c.tag == "circle"]  # fmt: skip
    texts = [e for e in root.iter() if e.tag == "text" and e.text.startswith("model number")]
    assert len(texts) == 7
    for text in texts:
        wide, x, y = 7.5 * len(text.text), float(text.get("x")), float(text.get("y"))
        left = x - wide if text.get("text-anchor") == "end" else x
        boxes.append((left, y - 10, left + wide, y + 2))
    for i, a in enumerate(boxes):
        for j, b in enumerate(boxes[:i]):
            if i >= 7:  # points may meet
                assert not svg._meet(a, b), (i, j)
