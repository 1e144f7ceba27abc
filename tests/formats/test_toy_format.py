"""The seam: a format is one file and one row of the table. This one stores a byte a code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import make_model

import qkit
from qkit import formats
from qkit.conversion.run import convert
from qkit.inspection import inspect
from qkit.kernels.codes import codes_of, values_of, weight_of
from qkit.kernels.weight import Weight
from qkit.sources import open_source
from qkit.spec import CHANNEL, LayerSpec, integer
from qkit.spec.dtypes import TensorMeta
from qkit.storage.manifest import Manifest


@dataclass(frozen=True)
class Toy(formats.Format):
    name: str = "toy"
    quant_method: ClassVar[str | None] = "toy"

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        return scheme.stored_with("F32", min_zero=0)

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        return None if scheme.symmetric else "toy has no zero points"

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        return {
            "toy_codes": TensorMeta("U8", shape),
            "toy_scale": TensorMeta("F32", (shape[0], scheme.groups(shape[1]))),
        }

    def pack(self, weight: Weight, scheme: LayerSpec | None = None) -> dict[str, torch.Tensor]:
        return {"toy_codes": codes_of(weight), "toy_scale": weight.scale}

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec) -> Weight:
        return weight_of(tensors["toy_codes"], tensors["toy_scale"], None, scheme.bits)

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        one = next(iter(schemes.values()))
        return {"quant_method": "toy", "bits": one.bits, "group_size": one.group_size}

    def extra_files(self, quantization_config: Mapping[str, Any]) -> dict[str, bytes]:
        return {"toy.json": b"{}"}

    def parse(self, quantization_config: Mapping[str, Any]) -> ToyReader:
        return ToyReader(integer(quantization_config["bits"], quantization_config["group_size"], scale_dtype="F32"))


@dataclass(frozen=True)
class ToyReader:
    spec: LayerSpec
    format: Toy = Toy()
    markers: ClassVar[tuple[str, ...]] = ("toy_codes",)
    scale: ClassVar[str] = "toy_scale"
    optional: ClassVar[tuple[str, ...]] = ()

    def scheme(self, module: str) -> LayerSpec | None:
        return self.spec

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        return ("toy_codes", "toy_scale")


class Stacking(Toy):
    """Experts go into one tensor, under a name of the format's own."""

    def place(self, name: str) -> str:
        layer, found, rest = name.partition(".experts.")
        _, _, local = rest.partition(".")
        leaf, dot, kind = local.partition(".")
        return f"blk.{layer.split('.')[2]}.{leaf}_exps{dot}{kind}" if found else name


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", ["w8a16", "none"])
def test_many_tensors_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, method: str) -> None:
    """A task may have many sources: what a file has as one tensor [experts, out, in]."""
    source = open_source(str(make_model(tmp_path / "mixtral", "mixtral")))
    monkeypatch.setitem(formats.FORMATS, "toy", Stacking())
    monkeypatch.setitem(formats.FORMATS, "safetensors", Stacking("safetensors"))
    options: dict[str, Any] = {"format": "toy" if scheme != "none" else "safetensors", "scheme": scheme}
    if scheme != "none":
        options |= {"group_size": 32, "method": method}
        options |= {"calib_samples": 2, "calib_len": 16} if method == "gptq" else {}
    result = convert(source.label, tmp_path / "out", **options)
    (task,) = [t for t in result.plan.tasks if t.outputs[0][0].startswith("blk.1.w1_exps")]
    assert task.sources == tuple(f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight" for e in range(4))
    assert task.bytes_in == sum(source.meta(name).nbytes for name in task.sources)
    written = open_source(str(tmp_path / "out"))
    experts = torch.stack([source.read(name) for name in task.sources])
    manifest = Manifest.load(tmp_path / "out")
    if scheme == "none":
        assert torch.equal(written.read("blk.1.w1_exps.weight"), experts)
        return
    codes, scale = written.read("blk.1.w1_exps.toy_codes"), written.read("blk.1.w1_exps.toy_scale")
    assert codes.shape == experts.shape and set(task.sources) <= set(manifest.tensors)
    for e in range(4):
        lost = values_of(weight_of(codes[e], scale[e], None, 8)) - experts[e].float()
        assert float(lost.norm() / experts[e].float().norm()) < 0.01


@pytest.mark.parametrize(("scheme", "group_size"), [("w4a16", 32), ("w8a16", CHANNEL)])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_convert_load_inspect_verify(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, group_size: int, method: str
) -> None:
    monkeypatch.setitem(formats.FORMATS, "toy", Toy())
    options: dict[str, Any] = {"scheme": scheme, "group_size": group_size, "method": method}
    if method == "gptq":
        options |= {"calib_samples": 4, "calib_len": 32}
    toy = convert(str(llama), tmp_path / "toy", format="toy", **options)
    ours = convert(str(llama), tmp_path / "ct", **options)
    assert (tmp_path / "toy" / "toy.json").is_file() and toy.plan.schemes.keys() == ours.plan.schemes.keys()
    assert Manifest.load(tmp_path / "toy").verify(tmp_path / "toy") == []
    found = inspect(str(tmp_path / "toy"))
    assert found.schemes == {next(iter(toy.plan.schemes.values())).describe(): 14}
    tokens = torch.arange(20).view(1, -1)
    with torch.no_grad():
        logits = qkit.load(str(tmp_path / "toy"))(tokens).logits.float()
        plain = qkit.load(str(llama))(tokens).logits.float()
    assert 0 < float((logits - plain).norm() / plain.norm()) < 0.5
