"""The seam: a method is one file and one row of the table. This one folds a factor into each norm, as AWQ does, then
rounds; it needs the moments of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import qkit
from qkit import methods
from qkit.conversion import execute
from qkit.conversion.run import convert
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.methods import Cost, Method, Quantized, rtn
from qkit.sources import open_source
from qkit.spec import LayerSpec
from qkit.storage.manifest import Manifest
from qkit.storage.safetensors import SafetensorsFile

NORMS = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}


class Toy(Method):
    name: ClassVar[str] = "toy"
    needs: ClassVar[str | None] = "moments"
    prepares: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("clip_search",)
    seen: ClassVar[list[tuple[str, ...]]] = []

    def prepare(
        self, block: nn.Module, read: Callable[[str], torch.Tensor], statistics: Mapping[tuple[str, ...], Any]
    ) -> Mapping[str, torch.Tensor]:
        """Doubles the channels of the largest inputs in the weight, and halves them in the norm: powers of two, so
        that the function stays the same to the bit."""
        changed = {}
        for linears, moments in statistics.items():
            self.seen.append(linears)
            norm = next((NORMS[n] for n in linears if n in NORMS), None)
            if norm is not None:
                factor = torch.where(moments.magnitude > moments.magnitude.median(), 2.0, 1.0)
                changed[f"{norm}.weight"] = read(f"{norm}.weight").float() / factor
                changed |= {f"{n}.weight": (read(f"{n}.weight").float() * factor).bfloat16() for n in linears}
        return changed

    def quantize(
        self, weights: Sequence[torch.Tensor], statistic: Any, specs: Sequence[LayerSpec], **options: Any
    ) -> list[Quantized]:
        assert statistic.square.shape == (weights[0].shape[1],)
        made = [rtn.quantize(w, spec, **options) for w, spec in zip(weights, specs, strict=True)]
        return [Quantized(weight, self.name, output_error=0.5) for weight in made]

    def cost(self, shapes: Sequence[tuple[int, int]], tokens: float) -> Cost:
        return Cost(flops=tokens)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    method = Toy()
    monkeypatch.setitem(methods.METHODS, "toy", method)
    Toy.seen.clear()
    return method


OPTIONS: dict[str, Any] = {"method": "toy", "scheme": "w8a16", "group_size": 32, "calib_samples": 4, "calib_len": 32}


def test_convert_load_inspect_verify(toy: Toy, llama: Path, tmp_path: Path) -> None:
    result = convert(str(llama), tmp_path / "out", clip_search=True, **OPTIONS)
    assert Manifest.load(tmp_path / "out").verify(tmp_path / "out") == []
    assert inspect(str(tmp_path / "out")).schemes == {"int8 symmetric g32": 14}
    shared = {frozenset(names) for names in Toy.seen}
    assert {frozenset(f"self_attn.{n}_proj" for n in "qkv"), frozenset({"mlp.down_proj"})} <= shared
    entries = Manifest.load(tmp_path / "out").tensors
    assert len(entries) == 14
    for entry in entries.values():
        assert (entry["method"], entry["output_error"], entry["calibration_tokens"]) == ("toy", 0.5, 128)
    # What was folded is on the disk, and the model computes what it did.
    source, out = open_source(str(llama)), open_source(str(tmp_path / "out"))
    norm = "model.layers.1.input_layernorm.weight"
    assert set((source.read(norm).float() / out.read(norm).float()).unique().tolist()) == {1.0, 2.0}
    assert torch.equal(out.read("model.norm.weight"), source.read("model.norm.weight"))
    tokens = torch.arange(20).view(1, -1)
    with torch.no_grad():
        logits = qkit.load(str(tmp_path / "out"))(tokens).logits.float()
        plain = qkit.load(str(llama))(tokens).logits.float()
    assert 0 < float((logits - plain).norm() / plain.norm()) < 0.05
    assert result.plan.predicted.seconds > 0


def test_what_was_folded_survives_an_interruption(
    toy: Toy, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(str(llama), tmp_path / "whole", **OPTIONS)
    write, calls = execute._write_shard, []

    def write_one(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise QkitError("stopped")
        write(*args)

    monkeypatch.setattr(execute, "_write_shard", write_one)
    with pytest.raises(QkitError, match="stopped"):
        convert(str(llama), tmp_path / "two", **OPTIONS)
    monkeypatch.undo()
    monkeypatch.setitem(methods.METHODS, "toy", toy)
    assert convert(str(llama), tmp_path / "two", **OPTIONS).resumed
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_what_belongs_to_other_methods_is_refused(toy: Toy, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(QkitError, match="--clip-search belongs to --method rtn, toy, not to gptq"):
        convert(str(llama), tmp_path / "out", **{**OPTIONS, "method": "gptq"}, clip_search=True)
    with pytest.raises(QkitError, match="unknown method 'tou'") as error:
        convert(str(llama), tmp_path / "out", **{**OPTIONS, "method": "tou"})
    assert error.value.hint == "known methods: rtn, gptq, imatrix, toy"
    assert SafetensorsFile(llama / "model.safetensors").names()
