"""The report: valid JSON, Markdown that cannot be broken out of, HTML that fetches nothing and escapes all."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import pytest
from pages import Page, bodies
from reports import HOSTILE, make

from qkit.measure.quality import Estimate
from qkit.measure.types import Formula
from qkit.report import charts, tables, wording
from qkit.report import write as report


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
    assert "://" not in page and "default-src 'none'" in page
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
    assert parsed["schema_version"] == 3 and parsed["kind"] == "measured" and parsed["passed"] is True
    assert parsed["models"][0]["name"] == HOSTILE
    assert parsed["models"][0]["quality"]["protocols"]["llama.cpp"]["against"]["kld"] == {"value": 0.2, "error": 0.001}


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
    assert json.loads(paths[0].read_text())["models"][0]["name"] == "model"
    assert paths[2].read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [(608.5, 4.391, "608.50 ± 4.39"), (0.00149, 1.02e-5, "0.001490 ± 0.000010"), (-0.0016, 0.0017, "-0.0016 ± 0.0017"),
     (12345.6, 321.0, "12,346 ± 321"), (0.5, 0.0, "0.5000 ± 0")],
)  # fmt: skip
def test_value_and_error_end_at_the_same_place(value, error, shown):
    assert wording.pm(Estimate(value, error)) == shown


def with_memory(result, **changes):
    (row,) = result.models
    return dataclasses.replace(
        result, models=(dataclasses.replace(row, memory=dataclasses.replace(row.memory, **changes)),)
    )


def test_formula_figures_have_columns_of_their_own():
    result = make()
    head, lines = tables.memory(result)
    assert head == ["", "model, measured", "model, by formula", "baseline, measured", "baseline, by formula"]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["KV cache at 512 tokens x batch 2 (--context)"] == ["51.0 kB", "52.0 kB"] * 2
    assert cells["weights"] == ["700.0 kB", "701.0 kB"] * 2
    measured = [cell for line in lines for cell in (line[1], line[3])]
    assert not {"52.0 kB", "701.0 kB", "832.0 kB"} & set(measured)
    assert all(len(line) == len(head) for line in lines)


def test_the_context_is_named_beside_the_model_s_own_maximum():
    result = make()
    cells = {line[0]: line[1:] for line in tables.memory(result)[1]}
    assert cells["KV cache at 8,192 tokens x batch 2 (the model's own maximum)"] == ["", "832.0 kB"] * 2
    for body in bodies(result).values():
        assert "whole context" not in body
    assert "at 512 tokens x batch 2" in report.summary(result)
    assert "at 512 tokens x batch 2 (--context)" in bodies(result)["html"]
    unknown = dataclasses.replace(result.models[0], formula=Formula(1, 2, "f", None, None))
    lines = tables.memory(dataclasses.replace(result, models=(unknown,), baseline=None))[1]
    assert ["KV cache at unknown tokens x batch 2 (the model's own maximum)", "", "-"] in lines


def test_the_process_is_in_the_total_and_the_total_is_held_against_what_is_free():
    result = make(baseline=False)
    cells = {line[0]: line[1] for line in tables.memory(result)[1]}
    assert cells["the process: Python, torch, libraries"] == "850.0 MB" and cells["total, at the peak"] == "850.8 MB"
    assert cells["free before loading"] == "1.0 GB" and cells["the device's"] == "8.0 GB"
    assert cells["total of free"] == "85.1%, fits"
    assert "fits: 85.1% of 1.0 GB free of the device's 8.0 GB" in report.summary(result)
    tight = with_memory(result, free_bytes=800_000_000, fits=False)
    assert "does NOT fit: 106.4% of 800.0 MB free of the device's 8.0 GB" in report.summary(tight)
    assert "in the machine's RAM beside it" not in cells
    on_gpu = dataclasses.replace(result, device={**result.device, "id": "cuda:0"})
    assert ["in the machine's RAM beside it", "850.0 MB", ""] in tables.memory(on_gpu)[1]


def test_what_was_not_measured_is_said():
    unknown = dict.fromkeys(("kv_cache", "activations", "process", "total", "host", "seen", "fits"))
    result = with_memory(make(baseline=False), **unknown, problem="its process was ended by SIGKILL")
    for name, body in bodies(result).items():
        assert "not measured (its process was ended by SIGKILL)" in body or name == "markdown"
        assert "its process was ended by SIGKILL" in body
    assert json.loads(report.to_json(result))["models"][0]["memory"]["total"] is None
    assert wording.verdict(result) == "700.0 kB of weights, 30.0 tokens/s when generating."


def test_the_headline_rate_is_that_of_generate():
    result = make()
    card = wording.cards(result)[-1]
    assert card["title"] == "Generate, batch 1" and card["value"] == "30.0 tok/s"
    assert card["note"] == "1.00x the baseline's 30.0; bare step 50.0, prefill 853 tok/s"
    head, lines = tables.speed(result)
    cells = dict(zip(head, lines[0], strict=True))
    assert [cells[f"{n} tok/s"] for n in ("generate", "with prompt", "bare step")] == ["30.0", "5.0", "50.0"]


def test_percentiles_and_hashes_are_folded_on_the_page_and_left_out_elsewhere():
    result = make()
    page = report.to_html(result)
    folded = "".join(re.findall(r"<details>(.*?)</details>", page, re.DOTALL))
    shown = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert [a for tag, a in Page(page).tags if tag == "details"] == [{}, {}, {}]  # closed
    for words in ('<th scope="row">99.9</th>', "sha256 of the text", "fingerprint of the model", "converted: method"):
        assert words in folded and words not in shown
    for body in (report.to_markdown(result), report.summary(result)):
        for words in ("99.9", "sha256", "fingerprint of", "converted: "):
            assert words not in body
    assert len(tables.facts(result)[1]) <= 12


QUANTIZED = "a baseline that is itself quantized (Q4_1, 5.74 bits per weight)"


def quantized():
    result = make()
    types = {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    base = dataclasses.replace(
        result.baseline, stored_bytes=900_000, stored_types=types, stored_quantized=True, bits_per_weight=5.74,
        memory=dataclasses.replace(result.baseline.memory, weights=2_000_000),
    )  # fmt: skip
    return dataclasses.replace(result, baseline=base)


def test_a_quantized_baseline_is_said_wherever_something_is_compared_with_it():
    result = quantized()
    size, kld, top, _ = wording.cards(result)
    assert size["note"] == (
        "11% larger than the 900.0 kB stored of a baseline that is itself quantized, 65% smaller than the 2.0 MB it "
        "expands to; 4.25 bits per weight"
    )
    assert kld["note"].endswith("; against " + QUANTIZED) and top["note"].endswith("; against " + QUANTIZED)
    assert wording.verdict(result).startswith(
        f"Adds 100.0 kB to the 900.0 kB stored of {QUANTIZED}, chooses the same next token as that baseline 20.0% of"
    )
    first = [line[0] for line in tables.quality(result)[1]]
    assert "mean KL divergence to the quantized baseline" in first and "top-1 agreement with it" in first
    assert "itself quantized: 210 x Q4_1, 61 x F32, 1 x Q8_0" in dict(tables.facts(result)[1])["baseline"]
    assert f"Quality against {QUANTIZED}" in report.to_markdown(result).replace("\\", "")
    # Of the drawing, of the folded percentiles and of the table: each says it where it stands.
    assert report.to_html(result).count(f"against {QUANTIZED}") >= 4
    parsed = json.loads(report.to_json(result))
    assert parsed["baseline"]["stored_quantized"] is True and parsed["baseline"]["stored_types"]["Q4_1"] == 210


def test_a_plain_baseline_is_not_called_quantized():
    for body in bodies(make()).values():
        assert "itself quantized" not in body and "quantized baseline" not in body


def test_a_quantized_folder_is_named_by_its_scheme():
    row = dataclasses.replace(make().models[0], schemes={"int4 symmetric g64": 210, "int8": 1})
    assert row.quantized_as == "int4 symmetric g64, 4.25 bits per weight"
    assert dataclasses.replace(row, stored_quantized=False).as_baseline == ""


def test_a_model_that_runs_dequantized_says_what_it_expands_to():
    result = make(baseline=False)
    row = dataclasses.replace(result.models[0], schemes={}, stored_types={"Q4_1": 1}, stored_bytes=300_000)
    note = wording.cards(dataclasses.replace(result, models=(row,)))[0]["note"]
    assert note == "4.25 bits per weight; expands to 700.0 kB in memory"
