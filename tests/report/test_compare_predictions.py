"""Reports compared: predictions, several models, damaged documents. Two measurements: tests/test_comparison.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import reports

from qkit.comparison import compare
from qkit.errors import QkitError
from qkit.measure.endpoint.command import write as served
from qkit.report import write
from qkit.report.changes import text


def saved(result, folder):
    folder.mkdir(parents=True, exist_ok=True)
    write.write(result, folder)
    return str(folder)


def test_several_are_paired_by_name_and_what_did_not_change_is_counted(tmp_path):
    before = reports.several()
    changed = dataclasses.replace(before.models[1], stored_bytes=9 * 10**5)
    after = dataclasses.replace(before, models=(before.models[0], changed))
    found = compare(saved(before, tmp_path / "a"), saved(after, tmp_path / "b"))
    assert [pair.before for pair in found.pairs] == ["a/small-w4", "a/middle-w8"] and found.unpaired == (
        "another-one-with-a-long-name-w4a16",
    )
    shown = text(found)
    assert "Nothing changed: small-w4" in shown and "Only in one report: another-one" in shown
    assert shown.count("size on disk") == 1 and "+12.5%" in shown


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    root = tmp_path_factory.mktemp("predictions")
    made = {
        "h100": reports.predicted(root / "a", ["Llama-3.3-70B"], ["h100-sxm"], scheme="w4a16"),
        "cheaper": reports.predicted(root / "b", ["Llama-3.3-70B"], ["h100-sxm"], scheme="w4a16", price_per_hour=1.0),
        "longer": reports.predicted(root / "c", ["Llama-3.3-70B"], ["h100-sxm"], scheme="w4a16", context=16384),
        "larger": reports.predicted(root / "d", ["Llama-3.3-70B"], ["h100-sxm", "h200-sxm"], scheme="w8a16"),
        "all": reports.predicted(root / "e", ["Llama-3.3-70B"], ["all"], scheme="w4a16"),
        "all, dearer": reports.predicted(root / "f", ["Llama-3.3-70B"], ["all"], scheme="w4a16", price_per_hour=9.0),
    }
    return {name: result.out for name, result in made.items()}


def test_figures_of_two_predictions(predictions):
    (pair,) = compare(predictions["h100"], predictions["cheaper"]).pairs
    assert pair.before.endswith("/Llama-3.3-70B on h100-sxm")
    assert pair["a million new tokens"].relative == pytest.approx(1 / 3.99 - 1)
    assert all(c.verdict == "the same" for c in pair.changes if c.figure != "a million new tokens")
    longer = compare(predictions["h100"], predictions["longer"])
    assert longer.pairs[0]["memory"].note == "not the same context" and not longer.pairs[0]["weights"].note
    found = compare(predictions["h100"], predictions["larger"], max_memory_increase=5.0, max_slowdown=5.0)
    assert found.unpaired == ("Llama-3.3-70B on h200-sxm",)
    assert "memory rose by 74" in " ".join(found.failures) and "decode cannot be held" in " ".join(found.failures)


def test_a_whole_catalogue_is_one_table_of_what_moved(predictions):
    shown = text(compare(predictions["all"], predictions["all, dearer"], markdown=True))
    assert shown.startswith("### qkit: what changed") and shown.count("####") == 1 and "| memory |" not in shown
    rows = [line for line in shown.splitlines() if line.startswith("| Llama")]
    priced = json.loads((Path(predictions["all"]) / "profile.json").read_text())["estimates"][0]["answers"]
    assert len(rows) == sum(a["costs"] is not None or a["speed"] is not None for a in priced if a["fits"])
    assert "Nothing changed: " in shown
    same = text(compare(predictions["all"], predictions["all"]))
    assert len(same.splitlines()) == 1 and same.strip().startswith("Nothing changed")


def test_what_is_no_report_is_refused(tmp_path, predictions):
    good = saved(reports.make(), tmp_path / "good")
    document = json.loads((tmp_path / "good" / "profile.json").read_text())

    def file(**changes) -> str:
        path = tmp_path / "bad.json"
        path.write_text(json.dumps({**document, **changes}))
        return str(path)

    with pytest.raises(QkitError, match=r"damaged report: device: must be an object, is null"):
        compare(good, file(device=None))
    with pytest.raises(QkitError, match=r"damaged report: models\[0\]\.memori: is not a field; memory is, and 1 more"):
        model = {k: v for k, v in document["models"][0].items() if k != "memory"}
        compare(file(models=[{**model, "memori": 1}]), good)
    with pytest.raises(QkitError, match="one report is measured, the other predicted"):
        compare(good, predictions["h100"])
    with pytest.raises(QkitError, match="nothing predicts quality"):
        compare(predictions["h100"], predictions["h100"], max_kld_increase=0.1)
    with pytest.raises(QkitError, match="nothing in common"):
        compare(saved(reports.several(), tmp_path / "several"), good)


def test_a_servers_load_before_and_after(tmp_path):
    before = reports.served()
    slower = [dataclasses.replace(level, output_tps=level.output_tps / 2) for level in before.levels[:2]]
    after = dataclasses.replace(before, levels=tuple(slower))
    for name, result in (("a", before), ("b", after), ("c", dataclasses.replace(after, context=1024))):
        (tmp_path / name).mkdir()
        served(result, tmp_path / name)
    a, b, c = (str(tmp_path / name) for name in "abc")
    found = compare(a, b, max_slowdown=40)
    assert [pair["output"].relative for pair in found.pairs] == [-0.5, -0.5]
    assert found.unpaired == ("concurrency 4", "concurrency 8") and len(found.failures) == 4
    assert "model, 2 at once" in text(found)
    same = compare(a, a)
    assert same.pairs[0]["failed requests"].before == 0 and same.pairs[3]["output"].before is None
    different = compare(a, c, max_slowdown=40)
    assert "cannot be held" in different.failures[0] and "context" in different.pairs[0]["output"].note
    with pytest.raises(QkitError, match="one report is of a running server, the other measured"):
        compare(a, saved(reports.make(), tmp_path / "good"))
    for name in ("max_kld_increase", "max_memory_increase"):
        with pytest.raises(QkitError, match="a server's load says nothing of it"):
            compare(a, b, **{name: 0.1})
