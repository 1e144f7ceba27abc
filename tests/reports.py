"""Profiles of every kind, for whoever shows them: measured ones of plain numbers, predictions of published configs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from qkit.estimate.command import predict
from qkit.estimate.result import Predicted
from qkit.hardware.catalogue import find, parse
from qkit.measure.endpoint.types import Endpoint, Failures, Level, Spread
from qkit.measure.engines.types import Point, Sweep, measured_point
from qkit.measure.options import Options
from qkit.measure.quality import DELTA_P_PERCENTILES, KLD_PERCENTILES, Divergence, Estimate, Quality, Scores
from qkit.measure.types import EvaluationText, Failed, Formula, Measured, Memory, Profile, Speed

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=a>|`**&amp;\n# x"


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
        "command": f"qkit profile '{name}' ```", "headline_protocol": "llama.cpp", "memory_allowed": 10**9,
    }  # fmt: skip
    device = {
        "id": "cpu", "name": name, "cores": 2, "threads": 2, "memory_bytes": 10**9, "available_bytes": 10**9,
        "features": (name,),
        "catalogue_id": "epyc-9654", "catalogue": dataclasses.asdict(find("epyc-9654")), "read_ceiling_gbs": 40.0,
    }  # fmt: skip
    text = EvaluationText(name, "12", 4, 512, True)
    plain = {"stored_types": {"BF16": 10}, "stored_quantized": False, "schemes": {}, "kernels": {}}
    quality = Quality(4, 512, 1000, scores, "both loaded")
    row = dataclasses.replace(row, quality=quality, on_frontier=True if baseline else None)
    plain |= {"quality": None, "on_frontier": None, "manifest_sha256": None, "conversion": {}}
    base = dataclasses.replace(row, stored_bytes=4 * 10**6, **plain) if baseline else None
    return Profile((row,), base, (), text, device, provenance, {"max_kld": 0.1}, failures, {name: name}, name)


PREDICTED = {
    "decode": {"tokens_per_s": 60.0, "low": 45.0, "high": 80.0, "measured": 50.0, "error": 0.2},
    "prefill": {"tokens_per_s": 700.0, "low": 350.0, "high": 800.0, "measured": 853.3, "error": -0.18},
    "first": {"seconds": 0.7, "low": 0.6, "high": 1.4, "measured": 0.6, "error": 0.1667},
    "memory": {"total": 900_000_000, "parts": {"weights": 700_000}, "measured": 850_823_000, "error": 0.058},
    "weights": {"bytes": 700_000, "measured": 700_000, "error": 0.0},
    "kv_cache": {"bytes": 51_000, "measured": None, "error": None},
    "basis": {"speed": "figures of qkit on other devices"},
    "problem": None,
}


def compared() -> Profile:
    """One whose predictions for this device stand beside its figures."""
    result = make()
    row = dataclasses.replace(result.models[0], predicted=PREDICTED, active_parameters=900_000)
    timed = tuple(
        dataclasses.replace(s, batch=n, read_gbs=20.0 / n, read_share=0.5 / n) for n, s in enumerate(row.speed, 1)
    )
    return dataclasses.replace(result, models=(dataclasses.replace(row, speed=timed),))


def several() -> Profile:
    """Three models and one that failed."""
    result = make()
    rows = []
    for i, name in enumerate(("a/small-w4", "a/middle-w8", "a/another-one-with-a-long-name-w4a16"), 1):
        each = make(name, kld=0.3 / i**2).models[0]
        rows.append(dataclasses.replace(each, name=name, stored_bytes=i * 400_000, on_frontier=i != 2))
    return dataclasses.replace(result, models=tuple(rows), failed=(Failed("a/broken", "lacks a tensor"),))


def swept() -> Profile:
    points = []
    for batch in (1, 4):
        for context in (512, 2048, 8192):
            plan = Point(batch, context, context, 8)
            if batch * context > 16384:
                points.append(dataclasses.replace(plan, skipped="its prefill alone would take longer"))
                continue
            steps = [0.01 * batch**0.5 * (1 + context / 8192)] * 7
            points.append(
                measured_point(
                    plan, warmups=1, ttft=[context / 800], tpot=steps, generate=[(1.0, 0.5)], peak_bytes=10**9
                )
            )
    points = [p if p.skipped else dataclasses.replace(p, read_gbs=12.3, read_share=0.31) for p in points]
    found = Sweep("qkit", "qkit 0.1", "model", {"dtype": "bfloat16", "threads": 2}, tuple(points))
    return dataclasses.replace(make(), sweeps=(found, dataclasses.replace(found, engine="llama.cpp")))


PUBLISHED = json.loads((Path(__file__).parents[1] / "benchmarks" / "published" / "models.json").read_text())
CONFIGS = {name: entry["config"] for entry in PUBLISHED for name in entry["names"]}


def config(root: Path, name: str, folder: str | None = None) -> str:
    """A folder with a published config alone."""
    place = root / (folder or name)
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps({**CONFIGS[name], "max_position_embeddings": 131072}))
    return str(place)


def predicted(root: Path, models: list[str], devices: list[str], **options) -> Predicted:
    """What `qkit profile` predicts, its report in root/report."""
    given = Options(device=tuple(devices), out=str(root / "report"), **options)
    return predict([config(root, name) for name in models], parse(devices), given)


def predictions(root: Path) -> dict[str, Predicted]:
    """One device, several on which it fits or not, all, and two models."""
    return {
        "one": predicted(root / "one", ["Llama-3.3-70B"], ["h100-sxm"], scheme="w4a16"),
        "four": predicted(root / "four", ["Llama-3.3-70B"], ["h100-sxm", "rtx-4090:2", "mi300x", "p40"]),
        "all": predicted(root / "all", ["Llama-3.3-70B"], ["all"], scheme="w4a16"),
        "two": predicted(
            root / "two",
            ["Llama-3.1-8B", "Mixtral-8x7B"],
            ["rtx-4090", "epyc-9654"],
            api_price=(1.5,),
            price_per_hour=0.4,
        ),
    }


def served() -> Endpoint:
    """A server at four concurrencies, of which one has failures and the last breaks it."""
    levels = []
    for n in (1, 2, 4, 8):
        times = [Spread(n * x, n * x, n * x * 1.2, n * x * 1.5) for x in (0.001, 0.2, 0.02, 0.02, 1.5)]
        failed = (
            (Failures("HTTP 500", n - 2, HOSTILE),) if n == 4 else (Failures("timed out", n, "8 s"),) if n == 8 else ()
        )
        good = 0 if n == 8 else n * 2 - sum(f.count for f in failed)
        spread = times if good else [None] * 5
        levels.append(
            Level(n, n * 2, good, failed, 0, 3.0, *spread, 512 * good, 64 * good, good / 3, 64 * good / 3,
                  20.0 * n if good else None, None)
        )  # fmt: skip
    provenance = {"qkit": "0", "python": "3", "system": "Linux", "date": "now", "command": "qkit profile --endpoint"}
    return Endpoint(
        "http://localhost:8000/v1", "org/model", "/completions", 512, "what the server counts", 64, True, "usage", 3,
        (Failures("HTTP 503", 1, "loading"),), tuple(levels), (16, 32), "at concurrency 8 no request succeeded",
        provenance, {"TTFT": "first"}, {"min_tps": 1.0}, ("at concurrency 8 no request succeeded",), "r",
    )  # fmt: skip


def measurements() -> dict[str, Profile]:
    return {"alone": make(baseline=False), "pair": make(), "beside": compared(), "several": several(), "swept": swept()}
