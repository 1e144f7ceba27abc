"""Calibration spread over workers gives the bytes of one machine's. The real Ray is in tests/interop/test_ray.py."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, FUSED, make_model, with_nan
from pools import GIB, Here, Use
from results import contents

from qkit.conversion import spread
from qkit.conversion.pool import RESTARTS, Lost, Node
from qkit.conversion.run import convert
from qkit.conversion.wire import Wire
from qkit.errors import QkitError

TEXT: dict[str, Any] = {"method": "gptq", "calib_samples": 7, "calib_len": 48}


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two windows, a sum of its own for every product of a Hessian's rows, slabs of tokens that begin in one
    part of the text and end in another, and several of rows."""
    monkeypatch.setattr("qkit.calibrate.cost.BATCH_BYTES", 2 * 48 * 256 * 2)
    monkeypatch.setattr("qkit.calibrate.apart._SUM_BYTES", 1)
    monkeypatch.setattr("qkit.calibrate.statistics.slab_tokens", lambda in_features: 80)
    monkeypatch.setattr("qkit.methods.gptq._SLAB", 1)
    monkeypatch.setattr("qkit.methods.gptq._LEAST_ROWS", 48)


def same(spread_out: Path, model: Path, folder: Path, **options: Any) -> None:
    """As one machine makes it."""
    convert(str(model), folder / "alone" / spread_out.name, **TEXT, **options)
    assert contents(spread_out) == contents(folder / "alone" / spread_out.name)


@pytest.mark.parametrize("options", [{}, {"format": "awq"}, {"format": "gptq", "scheme": "w8a16"}])
def test_every_format(llama: Path, tmp_path: Path, use: Use, options: dict[str, Any]) -> None:
    pool = use(Here())
    convert(str(llama), tmp_path / "out", ray="auto", **TEXT, **options)
    same(tmp_path / "out", llama, tmp_path, **options)
    steps = [args[1] for function, args in map(pickle.loads, pool.sent) if function is spread.run_step]
    # Four batches; of each block four stages; Hessians of 128, 128, 128 and 256 columns, in rows of 128.
    assert steps.count("inputs") == 2 * 4 * 4 and steps.count("add") == 2 * 4 * (1 + 1 + 1 + 2)
    assert steps.count("begin") == 2 * 4 and steps.count("join") == 2 * 7 and steps.count("solve") > 2 * 4


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral", "qwen2_moe", "llama4_text", "gpt_oss"])
def test_every_kind_of_block(family: str, tmp_path: Path, use: Use) -> None:
    """Experts, of which some get no token; blocks that differ from one another."""
    assert family in FAMILIES | FUSED
    model = make_model(tmp_path / "model", family)
    use(Here())
    convert(str(model), tmp_path / "out", ray="auto", **TEXT)
    same(tmp_path / "out", model, tmp_path)


def test_what_the_cluster_loses_is_made_again(llama: Path, tmp_path: Path, use: Use, capsys: Any) -> None:
    pool = use(Here())
    result, losses = pool.result, iter([False, False, True, False, False, False, True] + 20 * [False] + [True])

    def forgets(ticket: Any) -> Any:
        if next(losses, False):
            raise Lost("machines that are gone had what others need")
        return result(ticket)

    pool.result = forgets
    convert(str(llama), tmp_path / "out", ray="auto", **TEXT)
    same(tmp_path / "out", llama, tmp_path)
    assert capsys.readouterr().err.count("the block is begun anew") == 3
    pool.result = lambda ticket: (_ for _ in ()).throw(Lost("gone"))
    with pytest.raises(QkitError, match="gone"):
        convert(str(llama), tmp_path / "other", ray="auto", **TEXT)
    assert capsys.readouterr().err.count("the block is begun anew") == RESTARTS


@pytest.mark.parametrize("first", ["auto", None])
def test_a_run_that_is_cut_off_goes_on_here_or_there(llama: Path, tmp_path: Path, use: Use, midway: Any, first) -> None:
    use(Here())

    def cut() -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    midway(cut)
    with pytest.raises(KeyboardInterrupt):
        convert(str(llama), out, ray=first, **TEXT)
    second = use(Here())
    assert convert(str(llama), out, ray=None if first else "auto", **TEXT).resumed
    same(out, llama, tmp_path)
    if not first:
        steps = [args[1] for function, args in map(pickle.loads, second.sent) if function is spread.run_step]
        assert {"advance", "solve"} <= set(steps)


def test_what_a_worker_refuses_ends_the_run(llama: Path, tmp_path: Path, use: Use) -> None:
    source = with_nan(llama, tmp_path / "source", "model.layers.1.mlp.up_proj.weight", (3, 5))
    use(Here())
    with pytest.raises(QkitError, match=r"layers\.1\.mlp\.(up|gate)_proj\.weight.*(NaN|infinite)"):
        convert(str(source), tmp_path / "out", ray="auto", **TEXT)
    assert not (tmp_path / "out").exists()


def test_what_a_task_asks_for(llama: Path, tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores: as many as the driver's operations use, or what the smallest machine has."""
    threads = torch.get_num_threads()
    for offered, asked in ((64, threads), (1, 1)):
        pool = use(Here((Node(offered, 8 * GIB), Node(64, 8 * GIB))))
        convert(str(llama), tmp_path / str(offered), ray="auto", **TEXT)
        assert {cpus for cpus, _ in pool.asked[-20:]} == {asked}
        assert all(600 << 20 < memory < 2 * GIB for _, memory in pool.asked[-20:])
    use(Here((Node(4, 100 << 20),)))
    with pytest.raises(QkitError, match=r"a worker needs .* of memory"):
        convert(str(llama), tmp_path / "other", ray="auto", **TEXT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8, torch.bool])
def test_tensors_arrive_as_they_were_sent(dtype: torch.dtype) -> None:
    whole = torch.randn(6, 8).mul(3).to(dtype)
    value = {"view": whole[1:4, 2:], "none": whole[:0], "number": whole[2, 3], "all": [whole, (1, "x")]}
    sent: list[pickle.PickleBuffer] = []
    apart = pickle.dumps(Wire(value), 5, buffer_callback=sent.append)
    assert len(sent) >= 3 and len(apart) < 2000  # what is in tensors is not copied
    for arrived in (pickle.loads(apart, buffers=sent), pickle.loads(pickle.dumps(Wire(value), 5))):
        got = arrived.value
        assert got["all"][1] == (1, "x")
        for key in ("view", "none", "number"):
            assert got[key].dtype == dtype and got[key].shape == value[key].shape and torch.equal(got[key], value[key])
