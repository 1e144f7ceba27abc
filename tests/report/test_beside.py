"""What was predicted stands beside what was measured, in every form of the report; nothing where nothing was."""

from __future__ import annotations

import dataclasses

import reports
from pages import bodies

from qkit.report import beside, drawings
from qkit.report import write as report


def test_each_figure_with_its_interval_and_its_error():
    head, lines = beside.table(reports.compared())
    rows = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    decode = rows["model: decode, bare step, batch 1"]
    assert (decode["predicted"], decode["measured"]) == ("60.0 tok/s", "50.0 tok/s")
    assert decode["nine in ten"] == "45.0 tok/s to 80.0 tok/s" and decode["error"] == "+20.0%"
    prefill = rows["model: prefill of 512 tokens, batch 1"]
    assert prefill["nine in ten"].endswith(", missed") and prefill["error"] == "-18.0%"
    assert rows["model: first token after a prompt of 512 tokens"]["measured"] == "600.0 ms"
    assert rows["model: memory at 512 tokens x batch 2"]["predicted"] == "900.0 MB"
    assert (
        rows["model: · KV cache"]["measured"] == "not measured" and rows["model: · KV cache"]["predicted"] == "51.0 kB"
    )
    for name, body in bodies(reports.compared()).items():
        assert "45.0 tok/s to 80.0 tok/s" in body, name
    assert "figures of qkit on other devices" in report.to_html(reports.compared())


def test_what_was_not_predicted_is_left_out_or_said():
    assert beside.table(reports.make()) is None
    for body in bodies(reports.make()).values():
        assert "Predicted against measured" not in body and "nine in ten" not in body
    found = {
        **dict.fromkeys(reports.PREDICTED),
        "basis": {},
        "problem": "the catalogue has no bandwidth of this device",
    }
    result = reports.compared()
    row = dataclasses.replace(result.models[0], predicted=found)
    unknown = dataclasses.replace(result, models=(row,))
    assert beside.table(unknown) is None
    for name, body in bodies(unknown).items():
        assert "the catalogue has no bandwidth of this device" in body, name


def test_points_of_the_roofline_are_what_was_measured():
    """Two operations a parameter and token, over what a step was seen to read."""
    result = reports.compared()
    row, first = result.models[0], result.models[0].speed[0]
    spots = list(drawings._spots(row))
    decode, prefill = spots[:2]
    read = first.read_gbs * 1e9 * first.tpot_p50
    assert (
        decode.x == 2 * row.active_parameters * first.batch / read
        and decode.y == 2 * row.active_parameters * first.decode_tps
    )
    assert prefill.x == decode.x * first.prompt and prefill.y == 2 * row.active_parameters * first.prefill_tps
    assert "Roofline, measured" in report.to_html(result)
    mixture = dataclasses.replace(row, active_parameters=row.parameters // 4)
    assert not any(s.prefill for s in drawings._spots(mixture))
    for changes in ({"active_parameters": None}, {"speed": ()}):
        other = dataclasses.replace(result, models=(dataclasses.replace(row, **changes),))
        assert drawings.roof(other) is None and "Roofline" not in report.to_html(other)
