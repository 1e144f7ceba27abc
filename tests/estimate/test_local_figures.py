"""Figures that were measured here beside published ones: their columns, their fit, predicted against measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qkit.estimate.rates import fitted
from qkit.estimate.speed import Load, predict
from qkit.hardware.detect import LocalDevice, local_target

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import predicted_measured as table
from benchmarks.published import fitting, rows

ROOT = Path(__file__).parents[2]
HEADER = (
    "model,params_b,format,bits,engine,gpu,n_gpus,batch,prompt_len,gen_len_or_ctx,phase,tokens_per_s,vram_gib,source,"
    "bandwidth_gbs,head_bits\n"
)
CPU = "CPU:AMD EPYC 2T"


def line(model="SmolLM2-135M", format="W4A16", bits=4.25, engine="qkit", gpu=CPU, prompt=32, new=64, phase="decode",
         rate=100.0, bandwidth="40", head="16"):  # fmt: skip
    asked = f"1,1,{prompt},{new},{phase},{rate}"
    return f"{model},0.1,{format},{bits},{engine},{gpu},{asked},,made up,{bandwidth},{head}\n"


def read(path: Path, *lines: str) -> list[rows.Row]:
    path.write_text(HEADER + "".join(lines))
    found, skipped = rows.read(path)
    assert not skipped
    return found


def test_a_cpu_of_no_catalogue_has_the_bandwidth_that_was_measured(tmp_path):
    (row,) = read(tmp_path / "f.csv", line())
    device = row.setting.device
    assert (device.kind, device.bandwidth_gbs, device.capability, row.threads) == ("cpu", 40.0, "x86", 2)
    assert row.setting.engine.name == "qkit" and row.setting.kernel == "int4"
    arm = read(tmp_path / "f.csv", line(gpu="CPU:Neoverse-X9 4T"))[0]
    assert arm.setting.generation == "CPU arm" and arm.setting.device_key != row.setting.device_key
    # The same machine, as a profile sees it, is known by the terms of its figures; another one is not.
    here = local_target(LocalDevice("cpu", "AMD EPYC", 1 << 34, 1 << 33, 2, (), None), 40.0).device
    assert replace(row.setting, device=here).terms() == row.setting.terms()
    other = local_target(LocalDevice("cpu", "Xeon", 1 << 34, 1 << 33, 2, (), None), 40.0).device
    assert replace(row.setting, device=other).terms() != row.setting.terms()


def test_without_a_bandwidth_it_is_not_understood(tmp_path):
    (tmp_path / "f.csv").write_text(HEADER + line(bandwidth=""))
    found, skipped = rows.read(tmp_path / "f.csv")
    assert not found and "unknown device" in skipped[0]


def test_a_measured_bandwidth_counts_for_more_than_the_catalogue_s(tmp_path):
    known, measured = read(
        tmp_path / "f.csv", line(gpu="CPU:Ryzen-7950X 16T", bandwidth=""), line(gpu="CPU:Ryzen-7950X 16T")
    )
    assert known.setting.device.bandwidth_gbs != 40.0 == measured.setting.device.bandwidth_gbs
    assert known.setting.device_key == measured.setting.device_key == known.setting.device.id


def test_bits_of_the_head(tmp_path):
    given, usual, gguf = read(
        tmp_path / "f.csv",
        line(head="8.5"),
        line(head=""),
        line(engine="llama.cpp", format="GGUF Q4_0", bits=4.5, head=""),
    )
    values = 49152 * 576
    assert given.work.head_bytes == pytest.approx(values * 8.5 / 8) and usual.work.head_bytes == values * 2
    assert gguf.work.head_bytes == pytest.approx(values * 6.6 / 8, rel=1e-4)


def test_made_shapes_stand_for_no_other_model(tmp_path):
    made = [e for e in rows.entries() if e.get("made")]
    assert len(made) == 3
    for entry in made:
        (row,) = read(tmp_path / "f.csv", line(model=f'"{entry["names"][0]}"'))
        assert row.work.layers == entry["config"]["num_hidden_layers"]
        arch = rows._architecture(entry["names"][0], 0)[0]
        nearest, scale = rows._architecture("Nobody", arch.parameters / 1e9)
        assert nearest is not arch and scale != 1.0


def test_on_a_cpu_a_host_s_work_is_not_hidden(tmp_path):
    (row,) = read(tmp_path / "f.csv", line(engine="HF-transformers-5", format="BF16", bits=16))
    from qkit.estimate.speed import manner

    assert row.setting.engine.manner.overlaps and not manner(row.setting).overlaps


def some(tmp_path: Path, models=("SmolLM2-135M", "Gemma-3-270M", "Llama-2-7B")) -> list[rows.Row]:
    """Figures of a machine and an engine that reach 0.6 of its bandwidth, and are quick otherwise."""
    lines = [
        line(model=m, format=f, bits=b, prompt=p)
        for m in models
        for f, b in (("W4A16", 4.25), ("BF16", 16))
        for p in (32, 512)
    ]
    truth = replace(fitted(), terms={("bandwidth", "engine", "qkit"): (math.log(0.6 / 0.8), 0.0)})
    found = read(tmp_path / "some.csv", *lines)
    return [
        replace(r, tokens_per_s=predict(r.work, r.setting, r.load, threads=r.threads, fit=truth).tokens_per_s)
        for r in found
    ]


def test_each_model_is_predicted_by_the_others(tmp_path):
    figures = some(tmp_path)
    prior = replace(fitted(), terms={})
    left = fitting.each_left_out(figures, [], prior)
    assert [a.row for a in left] == figures and max(abs(a.error) for a in left) < 0.05
    assert all(a.covered for a in left)
    blind = fitting.check(figures, prior)
    assert min(abs(a.error) for a in blind) > 2 * max(abs(a.error) for a in left)
    # A figure of the model itself is of no use to it, wherever it stands: a lie about it changes nothing.
    smol = [r for r in figures if r.published["model"] == "SmolLM2-135M"]
    wild = [replace(r, tokens_per_s=r.tokens_per_s * 20) for r in smol]
    answers = fitting.each_left_out(smol, [*wild, *(r for r in figures if r not in smol)], prior)
    assert [a.predicted.tokens_per_s for a in answers] == pytest.approx([a.predicted.tokens_per_s for a in left[:4]])


def test_of_no_figures_the_fit_is_the_prior():
    assert fitting.fit([], fitted()).terms == {}


def test_the_table_of_predicted_and_measured(tmp_path):
    (a, b, c) = read(
        tmp_path / "f.csv",
        line(rate=100.0),
        line(prompt=512, new=0, phase="prefill", rate=400.0),
        line(engine="llama.cpp", format="GGUF Q4_K_M"),
    )
    said = predict(a.work, a.setting, Load(), threads=2)
    checked = [
        fitting.Checked(row, replace(said, tokens_per_s=rate, low=low, high=high))
        for row, rate, low, high in ((a, 120.0, 110.0, 130.0), (b, 300.0, 200.0, 500.0), (c, 1.0, 1.0, 1.0))
    ]
    found = table.speeds(checked)
    assert [(x.what, x.covered, round(x.error, 6)) for x in found] == [("decode", False, 0.2), ("prefill", True, -0.25)]
    found.append(table.Compared("SmolLM2-135M", "W4A16", "memory", 650e6, 640e6))
    text = table.markdown(found).splitlines()
    assert text[2] == ("| SmolLM2-135M | W4A16 | 120.0 | 100.0 | +20%* | 300.0 | 400.0 | -25% | 650 | 640 | +2% |")
    assert {row.count("|") for row in text[:3]} == {12}
    assert "decode, tokens/s: median error 20%, largest 20%" in text
    partial = table.markdown([*found, table.Compared("Other", "BF16", "decode", 2.0, 4.0)])
    assert "| Other | BF16 | 2.0 | 4.0 | -50% |  | |  |  | |  |" in partial


def test_a_second_file_changes_no_table_of_the_first(tmp_path):
    published = [line(model=m, gpu=g, bandwidth="", rate=r, engine="vLLM-1", format="fp16", bits=16)
                 for m, r in (("Llama-2-7B", 100), ("Llama-2-13B", 55), ("Llama-3.1-8B", 90))
                 for g in ("A100-80GB-SXM", "RTX 4090", "L40S")]  # fmt: skip
    (tmp_path / "published.csv").write_text(HEADER + "".join(published))
    (tmp_path / "local.csv").write_text(HEADER + line(rate=90) + line(model="Gemma-3-270M", rate=50))

    def run(*files: str) -> tuple[list[str], dict]:
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "speed_fit.py"),
            *(str(tmp_path / f) for f in files),
            "--check",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
        *text, last = done.stdout.splitlines()
        return text, json.loads(last)

    alone, figures = run("published.csv")
    both, more = run("published.csv", "local.csv")
    assert both[: len(alone)] == alone and "local.csv, each model left out" in "\n".join(both[len(alone) :])
    assert more.pop("local.csv")["figures"] == 2 and more == figures


def _environment() -> dict[str, str]:
    from qkit.measure.footprint import own_environment

    return own_environment()


def test_setting_of_this_release():
    from qkit.estimate.engines import ENGINES, release

    assert release(ENGINES["qkit"]) == "qkit" and release(ENGINES["vllm"]) == ""
