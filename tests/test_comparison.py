"""`qkit compare`: what changed between two reports, what is beyond chance, and which thresholds are missed."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from reports import HOSTILE, make

from qkit.cli import main
from qkit.comparison import compare
from qkit.errors import QkitError
from qkit.measure.quality import Estimate
from qkit.measure.types import Failed
from qkit.report import write as report
from qkit.report.changes import text
from qkit.report.figures import KLD, MEMORY, RATES


def changed(result, *, kld=None, tps=None, memory=None, name=None, nbytes=None, error=0.001):
    (row,) = result.models
    if kld is not None:
        scores = row.quality["llama.cpp"]
        against = dataclasses.replace(scores.against, kld=Estimate(kld, error))
        protocols = {**row.quality.protocols, "llama.cpp": dataclasses.replace(scores, against=against)}
        row = dataclasses.replace(row, quality=dataclasses.replace(row.quality, protocols=protocols))
    if tps is not None:
        row = dataclasses.replace(row, speed=tuple(dataclasses.replace(s, generate_tps=tps) for s in row.speed))
    if memory is not None:
        row = dataclasses.replace(row, memory=dataclasses.replace(row.memory, total=memory))
    row = dataclasses.replace(row, name=name or row.name, stored_bytes=nbytes or row.stored_bytes)
    return dataclasses.replace(result, models=(row,))


def save(folder, **results):
    paths = []
    for name, result in results.items():
        path = folder / f"{name}.json"
        path.write_text(report.to_json(result) if not isinstance(result, str) else result)
        paths.append(str(path))
    return paths


def test_figures_and_what_is_beyond_chance(tmp_path):
    a, b = save(tmp_path, a=make(), b=changed(make(), kld=0.2024, tps=27.0, nbytes=1_100_000))
    (pair,) = compare(a, b).pairs
    kld = pair[KLD]
    assert (kld.before, kld.after) == (0.2, 0.2024) and kld.difference == pytest.approx(0.0024)
    assert kld.error == pytest.approx(math.hypot(0.001, 0.001)) and kld.verdict == "within the error"
    assert pair["size on disk"].relative == pytest.approx(0.1) and pair["size on disk"].error is None
    assert pair[RATES["measured"]].relative == pytest.approx(-0.1) and pair[RATES["measured"]].verdict == ""
    assert pair[MEMORY].verdict == "the same" and pair["perplexity"].difference == 0
    further = compare(a, *save(tmp_path, c=changed(make(), kld=0.2029))).pairs[0]
    assert further[KLD].verdict == "beyond the error"


@pytest.mark.parametrize(("options", "failures"), [
    ({}, []),
    ({"max_kld_increase": 0.06, "max_slowdown": 21, "max_memory_increase": 11}, []),
    ({"max_kld_increase": 0.04},
     ["mean KL divergence rose by 0.05 (beyond the error), more than --max-kld-increase 0.04"]),
    ({"max_slowdown": 19}, ["generate is slower by 20.0 %, more than --max-slowdown 19"]),
    ({"max_memory_increase": 9}, ["memory rose by 10.0 %, more than --max-memory-increase 9"]),
])  # fmt: skip
def test_thresholds(tmp_path, capsys, options, failures):
    base = make()
    more = round(base.models[0].memory.total * 1.1)
    a, b = save(tmp_path, a=base, b=changed(base, kld=0.25, tps=24.0, memory=more))
    result = compare(a, b, **options)
    assert list(result.failures) == failures and result.passed is not bool(failures)
    argv = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert main(["compare", a, b, *argv, "--json"]) == (1 if failures else 0)
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["failures"] == failures and parsed["pairs"][0]["changes"][2]["verdict"] == "beyond the error"
    assert compare(b, a, **options).passed  # what got better misses nothing


def test_what_was_measured_otherwise_is_not_held_against_each_other(tmp_path):
    base = make()
    other = {
        "device": dataclasses.replace(base, device={**base.device, "name": "another"}),
        "text": dataclasses.replace(base, text=dataclasses.replace(base.text, sha256="other")),
        "baseline": dataclasses.replace(base, baseline=dataclasses.replace(base.baseline, fingerprint="other")),
        "alone": make(baseline=False),
    }
    a, *paths = save(tmp_path, a=base, **other)
    limits = {"max_kld_increase": 1.0, "max_slowdown": 99, "max_memory_increase": 99}
    found = {name: compare(a, path, **limits) for name, path in zip(other, paths, strict=True)}
    assert found["device"].failures == (
        "generate cannot be held against --max-slowdown 99: not the same device",
        "memory cannot be held against --max-memory-increase 99: not the same device",
    )
    kld = "mean KL divergence cannot be held against --max-kld-increase 1: "
    assert found["text"].failures == (kld + "not the same text",)
    assert found["baseline"].failures == (kld + "not the same baseline",)
    assert found["alone"].failures == (kld + "not in both reports",)
    assert found["text"].pairs[0]["perplexity"].note == "not the same text"
    assert compare(a, paths[0]).passed and "not the same device" in text(compare(a, paths[0]))


def test_what_was_not_measured(tmp_path):
    base = make()
    (row,) = base.models
    memory = dataclasses.replace(row.memory, total=None)
    row = dataclasses.replace(row, speed=(), quality=None, memory=memory)
    a, b = save(tmp_path, a=base, b=dataclasses.replace(base, models=(row,)))
    result = compare(a, b, max_slowdown=5, max_kld_increase=1, max_memory_increase=5)
    assert len(result.failures) == 3 and all("not in both reports" in f for f in result.failures)
    assert "not in both reports" in text(result)
    assert compare(b, b).passed and "generate" not in text(compare(b, b))


def test_models_are_paired_by_name(tmp_path):
    def named(*names):
        rows = tuple(changed(make(), name=f"/{i}/{name}").models[0] for i, name in enumerate(names))
        return dataclasses.replace(make(), models=rows)

    a, b, c, d = save(tmp_path, a=named("x", "y", "z"), b=named("z", "x", "w"), c=named("v", "u"), d=named("other"))
    result = compare(a, b, max_slowdown=5)
    assert [(p.before, p.after) for p in result.pairs] == [("/0/x", "/1/x"), ("/2/z", "/0/z")]
    assert result.unpaired == ("y", "w") and result.failures == ("y is in one report only", "w is in one report only")
    assert compare(a, b).passed
    with pytest.raises(QkitError, match="nothing in common: x, y, z, and v, u"):
        compare(a, c)
    one = save(tmp_path, e=named("x"))[0]
    assert compare(one, d).pairs[0].after == "/0/other"  # of one model each: named as they may be


def test_a_model_that_failed_is_in_no_pair(tmp_path):
    failed = dataclasses.replace(make(), failed=(Failed("/x/y", "no"),))
    a, b = save(tmp_path, a=make(), b=failed)
    assert len(compare(a, b).pairs) == 1


@pytest.mark.parametrize(("content", "message", "hint"), [
    ("{", "is not valid JSON", "profile.json"),
    ("[]", "holds a JSON list", "profile.json"),
    ('{"kind": "comparison", "schema_version": 3}', "is not a report of qkit profile", "profile.json"),
    ('{"kind": "measured"}', "is not a report of qkit profile", "profile.json"),
    ('{"kind": "measured", "schema_version": 2}', "schema version 2, and this qkit compares version 3", "again"),
    ('{"kind": "measured", "schema_version": 4}', "schema version 4", "upgrade"),
    ('{"kind": "measured", "schema_version": "x"}', "schema version x", "again"),
    ('{"kind": "measured", "schema_version": 3}', "damaged report: passed: is missing, and ", "profile.json"),
    ('{"kind": "measured", "schema_version": 3, "models": []}', "damaged report", "profile.json"),
    ('{"kind": "measured", "schema_version": 3, "models": [{"quality": 5}]}', "damaged report", "profile.json"),
    ("\xff", "is not valid JSON", "profile.json"),
    ("[" * 100_000, "is not valid JSON", "profile.json"),
    ('{"kind": "measured", "schema_version": 3, "passed": "' + "x" * 10**5 + '"}', "damaged report", "profile.json"),
])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_bad_documents(tmp_path, capsys, content, message, hint, first):
    (good,) = save(tmp_path, good=make())
    bad = tmp_path / "bad.json"
    bad.write_bytes(content.encode("latin-1"))
    with pytest.raises(QkitError, match=re.escape(message)) as caught:
        compare(*((bad, good) if first else (good, bad)))
    assert hint in caught.value.hint
    assert main(["compare", str(bad), good]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_number_that_no_float_holds_is_damage(tmp_path):
    (good,) = save(tmp_path, good=make())
    document = json.loads(Path(good).read_text())
    document["models"][0]["speed"][0]["decode_tps"] = 10**400
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(QkitError, match="must be a number"):
        compare(good, tmp_path / "bad.json")


def test_numbers_at_the_ends_of_what_a_float_can_be(tmp_path, capsys):
    (good,) = save(tmp_path, good=make())
    document = json.loads(Path(good).read_text())
    for name, value in (("a", 5e-324), ("b", 1.7e308), ("c", -1.7e308)):
        document["models"][0]["speed"][0]["generate_tps"] = value
        document["models"][0]["quality"]["protocols"]["llama.cpp"]["against"]["kld"] = {
            "value": value,
            "error": 1.7e308,
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    for first, second in (("a", "b"), ("b", "c"), ("c", "b")):
        assert main(["compare", str(tmp_path / f"{first}.json"), str(tmp_path / f"{second}.json"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] == "comparison"
    document["provenance"]["headline_protocol"] = "another"
    (tmp_path / "d.json").write_text(json.dumps(document))
    assert compare(tmp_path / "d.json", good).pairs[0][KLD].before is None


def test_files_and_folders(tmp_path, capsys):
    (good,) = save(tmp_path, profile=make())
    assert compare(tmp_path, good).passed
    with pytest.raises(QkitError, match=r"cannot read .*missing\.json: No such file"):
        compare(good, tmp_path / "missing.json")
    for argv in (["compare", good], ["compare", good, good, good], ["compare", good, good, "--max-slowdown", "-1"]):
        assert main(argv) == 2
    capsys.readouterr()


def test_a_table_and_a_summary_for_a_pull_request(tmp_path, capsys):
    a, b = save(tmp_path, a=make("first"), b=changed(make("first"), kld=0.25, tps=24.0, name=HOSTILE))
    assert main(["compare", a, b]) == 0
    shown = capsys.readouterr().out
    assert "mean KL divergence" in shown and "+0.05 ± 0.0014" in shown and "beyond the error" in shown
    assert "30.0 tok/s" in shown and "24.0 tok/s" in shown and "-20.0%" in shown
    assert main(["compare", a, b, "--markdown", "--max-slowdown", "10"]) == 1
    body = capsys.readouterr().out
    assert body.startswith("### qkit: ❌ thresholds missed\n") and "more than --max-slowdown 10" in body
    assert "<script" not in body.replace("\\<", "")
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len(rows) == 10 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert main(["compare", a, a, "--markdown", "--max-kld-increase", "0"]) == 0
    assert capsys.readouterr().out.startswith("### qkit: ✅ no threshold missed\n\n**Thresholds met: --max-kld")
