"""The report: valid JSON, Markdown that cannot be broken out of, HTML that fetches nothing and escapes all."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from qkit.measure.quality import DELTA_P_PERCENTILES, KLD_PERCENTILES, Divergence, Estimate, Quality, Scores
from qkit.measure.types import EvaluationText, Memory, Profile, Row, Speed
from qkit.report import charts
from qkit.report import write as report

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=a>|`**&amp;\n# x"
VOID = {"meta", "link", "img", "br", "hr", "input", "rect", "circle", "line"}


def names(wanted):
    return [{100.0: "max", 50.0: "median", 0.0: "min"}.get(p, f"{p:g}") for p in wanted]


def make(name="model", baseline=True, failures=(), kld=0.2) -> Profile:
    memory = Memory(
        weights=700, packed=400, embeddings=200, unquantized=100, kv_cache=50, kv_tokens=575, kv_cache_formula=50,
        kv_cache_context=48, kv_formula="2 x " + name, activations=70, activations_source="seen", process_before=None,
        process_after=10**9, total=818, device_bytes=10**9, fits=True,
    )  # fmt: skip
    speed = Speed(1, 512, 4, (0.5, 0.6, 0.7), (0.01, 0.02, 0.03), 0.6, 0.02, 0.0298, 853.3, 50.0, 12.3, None)
    sizes = ("LlamaForCausalLM", 10**6, 10**6, 4.25, "bfloat16")
    row = Row(name, name, *sizes, {name: 7}, {name: 7}, memory, (speed, speed))
    e = Estimate(kld, 0.001)
    percentiles = dict.fromkeys(names(KLD_PERCENTILES), kld), dict.fromkeys(names(DELTA_P_PERCENTILES), -kld)
    against = Divergence(e, e, 0.99, e, percentiles[0], e, e, percentiles[1], e)
    scores = {p: Scores(p, 100, Estimate(12.0, 0.5), against if baseline else None) for p in ("llama.cpp", "full")}
    provenance = {
        "qkit": "0", "python": "3", "torch": "2", "transformers": "5", "kernels": name, "system": "Linux",
        "date": "now",
        "command": f"qkit profile '{name}' ```", "headline_protocol": "llama.cpp", "model_fingerprint": "ab",
        "baseline_fingerprint": "cd" if baseline else None, "manifest_sha256": "ef",
        "conversion": {"method": name, "calibration": {"name": name}, "scheme": None},
    }  # fmt: skip
    device = {"name": name, "cores": 2, "threads": 2, "memory_bytes": 10**9, "features": (name,)}
    device["read_ceiling_gbs"] = 40.0
    text = EvaluationText(name, "12", 4, 512, True, name)
    base = dataclasses.replace(row, stored_bytes=4 * 10**6) if baseline else None
    quality = Quality(4, 512, 1000, scores)
    return Profile(row, base, quality, text, device, provenance, {"max_kld": 0.1}, failures, {name: name}, name)


class Page(HTMLParser):
    """Checks nesting, and collects tags, attributes and text."""

    def __init__(self, page: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text += data


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("name", ["model", HOSTILE])
@pytest.mark.parametrize("kld", [0.0, 1e-9, 0.2, 40.0])
def test_html_is_self_contained_and_escaped(name, baseline, kld):
    page = report.to_html(make(name, baseline, kld=kld))
    parsed = Page(page)
    tags = [tag for tag, _ in parsed.tags]
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form"} & set(tags)
    assert tags.count("h1") == 1 and "svg" in tags
    for _, attributes in parsed.tags:
        assert not {"src", "href", "srcset", "action", "xlink:href"} & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert "http" not in page
    # The quoted command holds the whole name; its backquotes are no markup in HTML.
    assert name.split("\n")[0] in parsed.text.replace("\n", " ") or name == "model"


def test_html_is_accessible():
    parsed = Page(report.to_html(make()))
    svgs = [a for tag, a in parsed.tags if tag == "svg"]
    assert len(svgs) == 3 and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in svgs)
    assert all("scope" in a for tag, a in parsed.tags if tag == "th")
    assert dict(parsed.tags[0][1]) == {"lang": "en"} or ("html", {"lang": "en"}) in parsed.tags


def test_every_chart_is_well_formed_xml():
    parts = [charts.Part("packed", HOSTILE, 5), charts.Part("kv", "empty", 0)]
    for chart in (
        charts.stacked_bars([(HOSTILE, parts), ("none", [charts.Part("kv", "x", 0)])]),
        charts.histogram([("packed", HOSTILE, [0.01, 0.01]), ("base", "b", [0.5])]),
        charts.histogram([("packed", "one", [0.01])]),
        charts.log_percentiles({"max": 3.0, "min": 0.0}, 0.5),
        charts.log_percentiles({"max": 0.0, "min": 0.0}, 0.0),
        charts.log_percentiles({"max": 1.0, "min": 1.0}, 1.0),
    ):
        root = ET.fromstring(str(chart))
        for element in root.iter():
            for key in ("x", "y", "width", "height", "x1", "x2", "cx"):
                assert float(element.get(key, 0)) >= 0 and float(element.get(key, 0)) <= 700


def test_a_missed_threshold_is_seen_everywhere():
    result = make(failures=("mean KL divergence 0.2 is above 0.1",))
    assert not result.passed and result.as_dict()["passed"] is False
    for body in (report.to_html(result), report.to_markdown(result), report.summary(result)):
        assert "Threshold missed" in body and "is above 0.1" in body
    assert "Thresholds met" in report.summary(make())


def test_json_has_a_version_and_round_trips():
    parsed = json.loads(report.to_json(make(HOSTILE)))
    assert parsed["schema_version"] == 1 and parsed["kind"] == "measured" and parsed["passed"] is True
    assert parsed["model"]["name"] == HOSTILE
    assert parsed["quality"]["protocols"]["llama.cpp"]["against"]["kld"] == {"value": 0.2, "error": 0.001}


@pytest.mark.parametrize("baseline", [True, False])
def test_markdown_tables_cannot_be_broken_out_of(baseline):
    body = report.to_markdown(make(HOSTILE, baseline))
    inside, cells = False, 0
    for line in body.split("\n"):
        if line.startswith("|"):
            count = len(re.findall(r"(?<!\\)\|", line))
            cells = count if not inside else cells
            inside = True
            assert count == cells
            assert "<script" not in line.replace("\\<", "")
        else:
            inside = False
    fence = re.search(r"^(`{4,})\n(.*?)\n\1$", body, re.MULTILINE | re.DOTALL)
    assert fence and "qkit profile" in fence[2]


def test_files_are_written_whole(tmp_path):
    paths = report.write(make(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(report.NAMES) == sorted(p.name for p in paths)
    assert json.loads(paths[0].read_text())["model"]["name"] == "model"
    assert paths[2].read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [(608.5, 4.391, "608.50 ± 4.39"), (0.00149, 1.02e-5, "0.001490 ± 0.000010"), (-0.0016, 0.0017, "-0.0016 ± 0.0017"),
     (12345.6, 321.0, "12,346 ± 321"), (0.5, 0.0, "0.5000 ± 0")],
)  # fmt: skip
def test_value_and_error_end_at_the_same_place(value, error, shown):
    assert report.pm(Estimate(value, error)) == shown
