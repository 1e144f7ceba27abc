"""Profiles made of figures, without measuring, and what reads the pages made of them."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

from qkit.measure.quality import DELTA_P_PERCENTILES, KLD_PERCENTILES, Divergence, Estimate, Quality, Scores
from qkit.measure.types import EvaluationText, Formula, Measured, Memory, Profile, Speed
from qkit.report import write as report

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=a>|`**&amp;\n# x"
VOID = {"meta", "link", "img", "br", "hr", "input", "rect", "circle", "line"}


def names(wanted):
    return [{100.0: "max", 50.0: "median", 0.0: "min"}.get(p, f"{p:g}") for p in wanted]


def make(name="model", baseline=True, failures=(), kld=0.2) -> Profile:
    memory = Memory(
        weights=700_000, packed=400_000, embeddings=200_000, unquantized=100_000, tokens=512, batch=2, kv_cache=51_000,
        activations=72_000, process=850_000_000, total=850_823_000, host=850_000_000, seen="seen", problem=None,
        free_bytes=1_000_000_000, device_bytes=8_000_000_000, fits=True,
    )  # fmt: skip
    formula = Formula(701_000, 52_000, "2 x " + name, 8192, 832_000)
    speed = Speed(
        1, 512, 4, (0.7, 0.8, 0.9), (0.1, 0.1, 0.1), 30.0, 5.0,
        (0.5, 0.6, 0.7), (0.01, 0.02, 0.03), 0.6, 0.02, 0.0298, 853.3, 50.0, 12.3, None,
    )  # fmt: skip
    row = Measured(
        name, name, "LlamaForCausalLM", 10**6, 10**6, {"I32": 7, "BF16": 3}, True, 4.25, "bfloat16", {name: 7},
        {name: 7}, memory, formula, True, (speed, speed), "alone", 1.0, None, None, name, (), "ab", "ef",
        {"method": name, "calibration": {"name": name}, "scheme": None},
    )  # fmt: skip
    e = Estimate(kld, 0.001)
    percentiles = dict.fromkeys(names(KLD_PERCENTILES), kld), dict.fromkeys(names(DELTA_P_PERCENTILES), -kld)
    against = Divergence(e, e, 0.99, e, percentiles[0], e, e, percentiles[1], e)
    scores = {p: Scores(p, 100, Estimate(12.0, 0.5), against if baseline else None) for p in ("llama.cpp", "full")}
    provenance = {
        "qkit": "0", "python": "3", "torch": "2", "transformers": "5", "kernels": name, "system": "Linux",
        "date": "now",
        "command": f"qkit profile '{name}' ```", "headline_protocol": "llama.cpp",
    }  # fmt: skip
    device = {"id": "cpu", "name": name, "cores": 2, "threads": 2, "memory_bytes": 10**9, "features": (name,)}
    device["read_ceiling_gbs"] = 40.0
    text = EvaluationText(name, "12", 4, 512, True)
    plain = {"stored_types": {"BF16": 10}, "stored_quantized": False, "schemes": {}, "kernels": {}}
    quality = Quality(4, 512, 1000, scores, "both loaded")
    row = dataclasses.replace(row, quality=quality, on_frontier=True if baseline else None)
    plain |= {"quality": None, "on_frontier": None, "manifest_sha256": None, "conversion": {}}
    base = dataclasses.replace(row, stored_bytes=4 * 10**6, **plain) if baseline else None
    return Profile((row,), base, (), text, device, provenance, {"max_kld": 0.1}, failures, {name: name}, name)


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


def bodies(result):
    return {
        "html": Page(report.to_html(result)).text,
        "markdown": report.to_markdown(result).replace("\\", ""),
        "summary": report.summary(result),
    }
