"""Tensors that pass through in pieces: the same bytes as whole, in memory that does not grow with them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, with_nan
from safetensors.torch import load_file

from qkit import convert
from qkit.conversion import tasks, verify
from qkit.conversion.containers import CONTAINERS
from qkit.conversion.execute import read_weights
from qkit.errors import QkitError
from qkit.kernels.codes import values_of
from qkit.sources import open_source
from qkit.sources.cast import CastSource
from qkit.sources.untied import HEAD, Untied
from qkit.spec.dtypes import TensorMeta
from qkit.storage.local import LocalStore
from qkit.storage.writer import Pieces, safetensors_header, write_safetensors

EMBEDDING = "model.embed_tokens.weight"


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("slabs") / "m", vocab_size=1024, intermediate_size=1152,
                      tie_word_embeddings=False)  # fmt: skip


@pytest.mark.parametrize("most", [256, 512, 4096])
def test_pieces_make_up_the_tensor(model: Path, most: int) -> None:
    source = open_source(str(model))
    for each in (source, CastSource(source), Untied(source)):
        for name in (EMBEDDING, HEAD, "model.norm.weight"):
            whole, read = each.read(name), each.rows(name)
            assert read is not None
            pieces = [read(a, min(a + most, len(whole))) for a in range(0, len(whole), most)]
            assert torch.equal(torch.cat(pieces), whole) and pieces[0].dtype == whole.dtype


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"method": "rtn", "scheme": scheme}
            for scheme in ("w4a16", "w4a16-asym", "w8a16", "w8a8", "fp8", "fp8-block")
        ),
        *({"method": "rtn", "scheme": scheme} for scheme in ("nvfp4a16", "mxfp4a16")),
        {"method": "rtn", "clip_search": True, "head": "8bit"},
        *(
            {"method": "rtn", "format": "gptq", "scheme": scheme}
            for scheme in ("w4a16", "w3a16", "w8a16", "w4a16-asym")
        ),
        {"method": "rtn", "format": "awq"},
        *({"method": "rtn", "format": "gguf", "scheme": scheme} for scheme in ("q8_0", "q4_0", "iq4_nl", "none")),
        {"format": "gguf", "scheme": "q4_0", "method": "imatrix", "calib_samples": 2, "calib_len": 32},
        *({"format": "bnb", "scheme": scheme} for scheme in ("nf4", "nf4-dq", "fp4", "int8")),
        {"format": "safetensors"},
        {"calib_samples": 2, "calib_len": 32},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_same_bytes_as_whole(model: Path, tmp_path: Path, monkeypatch: Any, options: dict[str, Any]) -> None:
    convert(str(model), str(tmp_path / "whole" / "out"), **options)
    used = []
    original = tasks.row_ranges

    def ranges(*given: Any) -> Any:
        used.append(original(*given))
        return used[-1]

    monkeypatch.setattr(tasks, "SLAB_BYTES", 1000)
    monkeypatch.setattr("qkit.conversion.produce.row_ranges", ranges)
    convert(str(model), str(tmp_path / "pieces" / "out"), **options)
    assert hashes(tmp_path / "whole" / "out") == hashes(tmp_path / "pieces" / "out")
    assert any(each is not None and len(each) > 1 for each in used)


@pytest.mark.parametrize(
    "options",
    [
        *({"scheme": scheme} for scheme in ("w4a16-asym", "w8a16", "fp8-block", "mxfp4a16")),
        {"format": "gguf", "scheme": "q4_k_m"},
        {"format": "gptq"},
        *({"format": "bnb", "scheme": scheme} for scheme in ("nf4", "nf4-dq", "int8")),
        {"format": "compressed-tensors", "method": "gptq", "calib_samples": 2, "calib_len": 32},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_what_is_read_back_by_rows_is_the_weight(
    model: Path, tmp_path: Path, monkeypatch: Any, options: dict[str, Any]
) -> None:
    plan = convert(str(model), str(tmp_path / "out"), **{"method": "rtn", **options}).plan
    written = CONTAINERS[plan.fmt.container].open(LocalStore(tmp_path / "out"), plan.shards)
    monkeypatch.setattr(tasks, "SLAB_BYTES", 1000)
    apart = 0
    for task in plan.tasks:
        if task.scheme is None:
            continue
        whole = read_weights(task, plan.fmt, written.read)
        for name, rows in verify._weights(plan, task, written):
            for first, end in tasks.slab_ranges(task.meta):
                got, expected = rows(first, end), whole[name].plain().rows(first, end)
                assert torch.equal(got.packed, expected.packed) and torch.equal(values_of(got), values_of(expected))
                apart += (first, end) != (0, task.meta.shape[0])
    assert apart > 10


def test_a_damaged_piece_is_named_and_nothing_is_left(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    bad = with_nan(model, tmp_path / "bad", EMBEDDING, (900, 3))
    monkeypatch.setattr(tasks, "SLAB_BYTES", 1000)
    with pytest.raises(QkitError, match=f"{EMBEDDING} contains NaN"):
        convert(str(bad), str(tmp_path / "out"), method="rtn")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([torch.zeros(2, 3)], "2 rows where 4 were announced"),
        ([torch.zeros(2, 3), torch.zeros(2, 2)], "got a piece of"),
        ([torch.zeros(4, 3).half()], "got a piece of"),
    ],
)
def test_pieces_that_make_up_something_else(tmp_path: Path, pieces: list[torch.Tensor], message: str) -> None:
    meta = TensorMeta("F32", (4, 3))
    with pytest.raises(ValueError, match=message):
        write_safetensors(LocalStore(tmp_path), "f.safetensors", [("a", meta)], [Pieces(meta, iter(pieces))])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_memory_does_not_grow_with_what_passes_through(tmp_path: Path) -> None:
    """An embedding and a head of 256 MB each, of zeros in a sparse file: peak memory would not hold one of them whole
    beside the process."""
    small, big = make_model(tmp_path / "small", num_hidden_layers=1, tie_word_embeddings=False), tmp_path / "big"
    tensors = load_file(small / "model.safetensors")
    entries = [(name, TensorMeta("BF16", (1_000_000, 128) if "norm" not in name and "layers" not in name else t.shape))
               for name, t in tensors.items()]  # fmt: skip
    shutil.copytree(small, big)
    config = json.loads((big / "config.json").read_text())
    (big / "config.json").write_text(json.dumps({**config, "vocab_size": 1_000_000}))
    with open(big / "model.safetensors", "wb") as file:
        file.write(safetensors_header(entries))
        file.truncate(file.tell() + sum(meta.nbytes for _, meta in entries))
    command = [sys.executable, "-m", "qkit", "convert", str(big), "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run([*command, "--method", "rtn"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    predicted, measured = answer["plan"]["peak_memory_predicted_bytes"], answer["peak_memory_measured_bytes"]
    assert 0.85 < measured / predicted < 1.15 and measured < 400 << 20
