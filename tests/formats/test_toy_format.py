"""The seam: a format is one file and one row of the table. This one stores a byte a code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import qkit
from qkit import formats
from qkit.conversion.run import convert
from qkit.inspection import inspect
from qkit.kernels.codes import codes_of, weight_of
from qkit.kernels.weight import Weight
from qkit.spec import CHANNEL, LayerSpec, integer
from qkit.spec.dtypes import TensorMeta
from qkit.storage.manifest import Manifest


@dataclass(frozen=True)
class Toy:
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

    def pack(self, weight: Weight) -> dict[str, torch.Tensor]:
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
    marker: ClassVar[str] = "toy_codes"
    scale: ClassVar[str] = "toy_scale"
    optional: ClassVar[tuple[str, ...]] = ()

    def scheme(self, module: str) -> LayerSpec | None:
        return self.spec

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        return ("toy_codes", "toy_scale")


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
