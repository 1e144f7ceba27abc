"""FP8 and NF4 folders as others write them, from the files to the logits; and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from safetensors.torch import load_file, save_file

import qkit
from qkit import formats
from qkit.errors import QkitError
from qkit.formats import fp8 as fp8_codec
from qkit.inspection import inspect
from qkit.kernels import reference
from qkit.kernels.codes import values_of
from qkit.kernels.weight import TABLES, Nested, Weight
from qkit.runtime import QuantLinear
from qkit.spec import LayerSpec, fp8, table

Tensors = dict[str, torch.Tensor]
Encode = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]  # weight -> (tensors by local name, values)


def folder(tmp_path: Path, encode: Encode, config: dict[str, Any], **changes: Any) -> tuple[Path, Path]:
    """(a folder whose block linears are encoded, a plain one with the values they stand for)."""
    plain = make_model(tmp_path / "plain", **changes)
    coded = make_model(tmp_path / "coded", **changes)
    tensors = load_file(plain / "model.safetensors")
    stored, values = {}, {}
    for name, tensor in tensors.items():
        if ".layers." in name and name.endswith("_proj.weight"):
            local, value = encode(tensor)
            stored |= {f"{name.removesuffix('.weight')}.{k}": t.contiguous() for k, t in local.items()}
            values[name] = value.to(torch.bfloat16)
        else:
            stored[name] = values[name] = tensor
    save_file(stored, coded / "model.safetensors", {"format": "pt"})
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    given = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**given, "quantization_config": config}))
    return coded, plain


def same_logits(coded: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, tolerance: float) -> None:
    """To the bit by the reference, and nearly so by whatever kernel serves."""
    tokens = torch.arange(24).view(1, -1)
    with torch.no_grad():
        expected = qkit.load(str(plain), device="cpu")(tokens).logits.float()
        served = qkit.load(str(coded), device="cpu")(tokens).logits.float()
        monkeypatch.setattr(reference, "forced", lambda: True)
        exact = qkit.load(str(coded), device="cpu")(tokens).logits.float()
        plain_exact = qkit.load(str(plain), device="cpu")(tokens).logits.float()
    assert torch.equal(exact, plain_exact)
    assert float((served - expected).norm() / expected.norm()) <= tolerance


def encode_fp8(
    rows: int, columns: int, scale_name: str = "weight_scale", dtype: torch.dtype = torch.bfloat16
) -> Encode:
    def encode(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        out, in_ = w.shape
        r, c = rows or out, columns or in_
        spread = torch.empty(out, in_)
        scales = torch.empty(-(-out // r), in_ // c)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = w[i * r : (i + 1) * r, j * c : (j + 1) * c].float()
                scales[i, j] = (block.abs().max() / 448).to(dtype)
                spread[i * r : (i + 1) * r, j * c : (j + 1) * c] = scales[i, j]
        codes = (w.float() / spread).to(torch.float8_e4m3fn)
        stored = scales.to(dtype)
        local = {"weight": codes, scale_name: stored.view(1) if not rows else stored}
        return local, codes.float() * spread

    return encode


def ct_config(strategy: str, **weights: Any) -> dict[str, Any]:
    arguments = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **weights}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": inputs, "format": "float-quantized"}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group},
            "ignore": ["lm_head"]}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "columns", "config", "described"),
    [
        (1, 0, ct_config("channel"), "fp8 channel, float8 activations"),
        (0, 0, ct_config("tensor"), "fp8 tensor, float8 activations"),
        (1, 32, ct_config("group", group_size=32), "fp8 g32, float8 activations"),
        (64, 64, ct_config("block", block_structure=[64, 64]), "fp8 64x64, float8 activations"),
        (96, 64, ct_config("block", block_structure=[96, 64]), "fp8 96x64, float8 activations"),  # ragged rows
    ],
)
def test_fp8_of_compressed_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, config: dict[str, Any], described: str
) -> None:
    coded, plain = folder(tmp_path, encode_fp8(rows, columns), config)
    found = inspect(str(coded))
    assert found.schemes == {described: 14} and found.parameters == inspect(str(plain)).parameters
    same_logits(coded, plain, monkeypatch, 0)


@pytest.mark.parametrize("block", [(128, 128), (48, 64)])
def test_fp8_blocks_of_deepseek_and_qwen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: tuple[int, int]
) -> None:
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    encode = encode_fp8(*block, "weight_scale_inv", torch.float32)
    coded, plain = folder(tmp_path, encode, config)
    assert inspect(str(coded)).schemes == {f"fp8 {block[0]}x{block[1]}, float8 activations": 14}
    same_logits(coded, plain, monkeypatch, 0)


def encode_4bit(kind: str, block: int, double: bool) -> Encode:
    """bitsandbytes' layout, nearest codes."""

    def encode(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values = torch.tensor(TABLES[kind])
        blocks = w.float().view(-1, block)
        absmax = blocks.abs().amax(1)
        codes = ((blocks / absmax[:, None])[..., None] - values).abs().argmin(-1).to(torch.uint8).flatten()
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(w.shape)}
        local = {"weight": ((codes[0::2] << 4) | codes[1::2]).view(-1, 1), "weight.quant_map": values}
        local["weight.absmax"] = absmax
        if double:
            offset = float(absmax.mean())
            map_ = torch.linspace(-1, 1, 256)
            padded = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
            outer = padded.abs().amax(1)
            inner = ((padded / outer[:, None])[..., None] - map_).abs().argmin(-1).to(torch.uint8)
            local["weight.absmax"] = inner.flatten()[: absmax.numel()]
            local |= {"weight.nested_absmax": outer, "weight.nested_quant_map": map_}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            absmax = (map_[inner.int()] * outer[:, None]).flatten()[: absmax.numel()] + offset
        raw = json.dumps(state).encode()
        local[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(raw), dtype=torch.uint8)
        return local, (values[codes.int()].view(-1, block) * absmax[:, None]).view(w.shape)

    return encode


def bnb_config(kind: str, double: bool) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double}  # fmt: skip


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("kind", "block"), [("nf4", 64), ("nf4", 128), ("fp4", 64)])
def test_bitsandbytes_4bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: int, double: bool
) -> None:
    coded, plain = folder(tmp_path, encode_4bit(kind, block, double), bnb_config(kind, double))
    model = qkit.load(str(coded), device="cpu")
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14 and all(m.scheme.kind == kind for m in layers)
    assert all((m.scheme.scale.over is not None) == double for m in layers)
    from qkit.kernels import backend

    if not backend().startswith("torch"):
        assert all(m.select(torch.bfloat16).name == "cpu" for m in layers)
    assert inspect(str(coded)).parameters == inspect(str(plain)).parameters
    same_logits(coded, plain, monkeypatch, 0.02)


def test_scales_of_scales_and_blocks_in_memory() -> None:
    """`plain` is what kernels see; slices, copies and descriptions agree with it."""
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (6, 32 // 4), dtype=torch.int32)
    nested = Nested(torch.linspace(-1, 1, 256), torch.rand(2), 7, 1.5)
    inner = torch.randint(0, 256, (6, 2), dtype=torch.uint8)
    w = Weight(torch.randint(-(2**31), 2**31 - 1, (6, 2), dtype=torch.int32), inner, None, 4, 16, "nf4", nested=nested)
    expected = torch.stack([nested.table[int(c)] * nested.absmax[i // 7] + 1.5 for i, c in enumerate(inner.flatten())])
    assert torch.equal(w.float_scale(), expected.view(6, 2)) and torch.equal(w.plain().scale, w.float_scale())
    plain = w.plain()
    assert w.spec.scale.over is not None and w.spec.scale.over.block == (1, 7) and plain.plain() is plain
    assert torch.equal(values_of(w)[2:5], values_of(w.rows(2, 5)))
    block = Weight(codes, torch.rand(2, 4), None, 8, 32, "fp8", scale_rows=4)
    assert block.spec.scale.block == (4, 8) and block.plain().scale.shape == (6, 4)
    assert torch.equal(block.float_scale(), block.scale[torch.arange(6) // 4])
    assert torch.equal(values_of(block)[3:6], values_of(block.rows(3, 6)))
    whole = Weight(codes, torch.rand(1, 1), None, 8, 32, "fp8", scale_rows=6)
    assert whole.spec.scale.block == (0, 0)
    with pytest.raises(ValueError, match="does not fit"):
        Weight(codes, torch.rand(2, 4), None, 8, 32, "fp8")
    with pytest.raises(TypeError, match=r"scale is torch\.float32, expected torch\.uint8"):
        Weight(codes, torch.rand(6, 4), None, 8, 32, "fp8", nested=nested)


@pytest.mark.parametrize("spec", [fp8(), fp8((0, 0)), fp8((4, 8)), fp8((1, 8))], ids=LayerSpec.describe)
def test_fp8_packing_is_exact(spec: LayerSpec) -> None:
    rows, groups = spec.scale.shape((6, 32))
    scale = torch.rand(rows, groups).bfloat16()
    codes = torch.randint(-(2**31), 2**31 - 1, (6, 8), dtype=torch.int32)
    w = Weight(codes, scale, None, 8, 32, "fp8", scale_rows=spec.scale.block[0] or 6)
    tensors = fp8_codec.pack(w, spec, "weight_scale")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        k: m.shape for k, m in fp8_codec.metas((6, 32), spec, "weight_scale").items()
    }
    back = fp8_codec.unpack(tensors, spec, "weight_scale")
    assert torch.equal(back.packed, codes) and torch.equal(back.scale, scale) and back.spec == w.spec == spec


BROKEN_BNB: list[tuple[Callable[[Tensors], object], str]] = [
    (lambda t: t.update({"weight.quant_state.bitsandbytes__nf4": torch.tensor([1], dtype=torch.uint8)}), "valid JSON"),
    (lambda t: t.update({"weight.quant_map": torch.zeros(16)}), "not the table of nf4"),
    (lambda t: t.update({"weight.absmax": t["weight.absmax"][:-1]}), "absmax.* expected 512 of F32"),
    (lambda t: t.update({"weight": t["weight"][:-1]}), "'weight' is U8 .* expected"),
    (lambda t: t.update({"weight.quant_state.bitsandbytes__nf4": as_state({"shape": [0, 1]})}), "shape \\[0, 1\\]"),
    (lambda t: t.update({"weight.quant_state.bitsandbytes__nf4": as_state([])}), "shape None"),
]


def as_state(value: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(("change", "message"), BROKEN_BNB)
def test_broken_bitsandbytes_tensors(change: Callable[[Tensors], object], message: str) -> None:
    tensors, _ = encode_4bit("nf4", 64, False)(torch.randn(256, 128))
    change(tensors)
    with pytest.raises(QkitError, match=message):
        formats.get("bnb").unpack(tensors, table("nf4"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "neither 4 nor 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "float32"}, "float32"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "'af4'"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [1, 1], "activation_scheme": "static"}, "static"),
        (ct_config("attn_head"), "attn_head"),
        (ct_config("block"), "strategy block needs a size"),
        (ct_config("channel", num_bits=4), "4-bit float"),
    ],
)
def test_configs_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QkitError, match=message):
        formats.reader({"quantization_config": config})


@pytest.mark.parametrize("name", ["fp8"])
def test_what_is_only_read_says_so(llama: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(QkitError, match="read, not written"):
        qkit.convert(str(llama), tmp_path / "out", format=name, method="rtn")
