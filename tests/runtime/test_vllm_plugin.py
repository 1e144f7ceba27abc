"""Where the vLLM plug-in puts our kernels, in a vLLM made of what it touches; what is left of prepacked layers."""

from __future__ import annotations

import csv
import enum
import importlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from allocated import most

from qkit.hardware.catalogue import profile_path
from qkit.kernels import Weight, pack, reference
from qkit.runtime.vllm import loading, measured, plugin


class Platform(enum.Enum):
    CPU = "cpu"
    CUDA = "cuda"


class QkitLinearKernel: ...


class QkitInt8LinearKernel: ...


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tables as vLLM has them, and the functions that the plug-in calls."""
    tables: dict[str, dict[Platform, list[Any]]] = {
        kind: {Platform.CPU: ["theirs"], Platform.CUDA: ["machete", "marlin"]} for kind in ("mp", "int8")
    }
    linear = ModuleType("vllm.model_executor.kernels.linear")
    linear._POSSIBLE_KERNELS, linear._POSSIBLE_INT8_KERNELS = tables["mp"], tables["int8"]  # type: ignore[attr-defined]
    linear.register_linear_kernel = lambda kernel, on, kind: tables[kind][on].append(kernel)  # type: ignore[attr-defined]
    platforms = ModuleType("vllm.platforms")
    platforms.PlatformEnum = Platform  # type: ignore[attr-defined]
    card = type("Card", (), {"name": "NVIDIA H100 80GB HBM3", "is_cuda": lambda self: True})()
    card.get_device_name = lambda: card.name
    platforms.current_platform = card  # type: ignore[attr-defined]
    logger = ModuleType("vllm.logger")
    logger.init_logger = logging.getLogger  # type: ignore[attr-defined]
    ours = ModuleType("qkit.runtime.vllm.kernels")
    ours.QkitLinearKernel, ours.QkitInt8LinearKernel = QkitLinearKernel, QkitInt8LinearKernel  # type: ignore[attr-defined]
    kernels = ModuleType("vllm.model_executor.kernels")
    kernels.linear = linear  # type: ignore[attr-defined]
    modules = {
        "vllm": ModuleType("vllm"), "vllm.logger": logger, "vllm.platforms": platforms,
        "vllm.model_executor": ModuleType("vllm.model_executor"), "vllm.model_executor.kernels": kernels,
        "vllm.model_executor.kernels.linear": linear, "qkit.runtime.vllm.kernels": ours,
    }  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("QKIT_VLLM", raising=False)
    return type("Vllm", (), {"tables": tables, "card": card})()


def rows(path: Path, *given: tuple[str, str, float, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["card", "kernel", "ratio", "date", "command"])
        writer.writerows(
            [card, kernel, ratio, date, "benchmarks/vllm_decode.py"] for card, kernel, ratio, date in given
        )


def test_last_on_cuda_and_first_on_cpus(vllm: Any) -> None:
    for _ in range(2):  # vLLM calls it in every process, and more than once
        plugin.register()
    assert vllm.tables["mp"] == {
        Platform.CPU: [QkitLinearKernel, "theirs"], Platform.CUDA: ["machete", "marlin", QkitLinearKernel],
    }  # fmt: skip
    assert vllm.tables["int8"][Platform.CUDA] == ["machete", "marlin", QkitInt8LinearKernel]


def test_first_where_the_user_says_so_and_off(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKIT_VLLM", "0")
    plugin.register()
    assert vllm.tables["mp"][Platform.CPU] == ["theirs"]
    monkeypatch.setenv("QKIT_VLLM", "1")
    plugin.register()
    assert vllm.tables["mp"][Platform.CUDA][0] is QkitLinearKernel


def test_first_on_a_card_where_it_was_measured_faster(
    vllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vllm.csv"
    monkeypatch.setattr(measured, "profile_path", lambda name: path)
    rows(
        path,
        (vllm.card.name, "QkitLinearKernel", 1.3, "2027-01-01"),
        ("other", "QkitInt8LinearKernel", 9, "2027-01-01"),
    )
    plugin.register()
    assert vllm.tables["mp"][Platform.CUDA] == [QkitLinearKernel, "machete", "marlin"]
    assert vllm.tables["int8"][Platform.CUDA] == ["machete", "marlin", QkitInt8LinearKernel]


def test_a_card_that_cannot_be_asked_is_unknown(vllm: Any) -> None:
    def fail() -> str:
        raise RuntimeError("NVML")

    vllm.card.get_device_name = fail
    plugin.register()
    assert vllm.tables["mp"][Platform.CUDA][-1] is QkitLinearKernel


def test_the_newest_measurement_counts(tmp_path: Path) -> None:
    path = tmp_path / "vllm.csv"
    rows(path, ("a", "k", 1.5, "2026-01-01"), ("a", "k", 1.04, "2027-01-01"), ("b", "k", 1.05, "2026-05-05"))
    assert not measured.faster_on("a", "k", path) and measured.faster_on("b", "k", path)
    assert not measured.faster_on("c", "k", path)
    assert not measured.faster_on("a", "k", tmp_path / "absent.csv")
    for broken in ("card,kernel,ratio,date,command\na,k,fast,2027-01-01,x\n", "card\na\n", "\0"):
        path.with_name("broken.csv").write_text(broken)
        assert not measured.faster_on("a", "k", path.with_name("broken.csv"))
    with profile_path(measured.FILE).open() as file:
        assert csv.DictReader(file).fieldnames == ["card", "kernel", "ratio", "date", "command"]


def test_released_parameters_still_answer_for_device_and_type() -> None:
    """vLLM's LoRA layers ask the base layer's packed weight where it is (lora/layers/utils.py)."""
    layer = torch.nn.Linear(4, 8, bias=False)
    layer.register_parameter("weight_packed", torch.nn.Parameter(torch.ones(8, 2).int(), requires_grad=False))
    layer.weight_scale = None
    measured.release(layer, ("weight_packed", "weight_scale", None, "absent"))
    assert layer.weight_packed.device == torch.device("cpu") and layer.weight_packed.dtype == torch.int32
    assert layer.weight_packed.numel() == 0 and layer.weight_scale is None and not hasattr(layer, "absent")
    assert "weight_packed" in dict(layer.named_parameters())


def variables() -> dict[str, Any]:
    """vLLM's environment variables: all of them count in the name of a compiled model (envs.compile_factors)."""
    return {"VLLM_USE_V1": lambda: True}


def factors(table: dict[str, Any]) -> dict[str, Any]:
    return {name: getter() for name, getter in table.items()}


def test_what_layers_run_on_is_in_the_name_of_the_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(*kernels: str) -> dict[str, Any]:
        table = variables()
        seen = loading.Loading(table)
        seen.made = 3
        for kernel in kernels:
            (seen.theirs if kernel == "Marlin" else seen.ours)(kernel)
        return factors(table)

    assert model("Marlin", "Marlin", "Marlin") == factors(variables())  # a model without us keeps its name
    names = [model("cpu", "cpu", "cpu"), model("cpu", "Marlin", "cpu"), model("Marlin", "Marlin", "cpu"), model("cpu")]
    assert all(a != b for i, a in enumerate([factors(variables()), *names]) for b in names[i:])
    monkeypatch.setattr(loading, "__version__", "99")
    assert model("cpu", "cpu", "cpu") not in names


def test_the_name_is_the_same_when_a_process_loads_a_model_again(caplog: pytest.LogCaptureFixture) -> None:
    table = variables()
    seen, found = loading.Loading(table), []
    for _ in range(2):
        seen.made += 2
        with caplog.at_level(logging.INFO, "vllm.plugins.qkit"):
            seen.ours("cpu")
            seen.ours("cpu")
        found.append(factors(table))
    seen.made += 1
    seen.ours("cpu", "blocks of 8 experts")  # a draft model is another
    assert found[0] == found[1] != factors(table)
    assert [r.getMessage() for r in caplog.records] == ["qkit's kernels: 2 linears on cpu"] * 2


@dataclass
class Config:
    """vLLM's MPLinearLayerConfig and Int8ScaledMMLinearLayerConfig, as far as they are read."""

    partition_weight_shape: tuple[int, int] = (0, 0)
    weight_type: str = ""
    act_type: torch.dtype = torch.bfloat16
    group_size: int = -1
    zero_points: bool = False
    out_type: torch.dtype | None = None
    is_channelwise: bool = True


class Base:
    """vLLM's MPLinearKernel and Int8ScaledMMLinearKernel."""

    def __init__(self, config: Config, *names: str | None) -> None:
        self.config, self.layer_param_names = config, names
        self.w_q_name, self.w_s_name, self.w_zp_name = (*names, None)[:3]

    def _get_weight_params(self, layer: Any) -> tuple[Any, ...]:
        return tuple(getattr(layer, name or "", None) for name in (*self.layer_param_names, None, None)[:3])

    _get_layer_params = _get_weight_params


@pytest.fixture
def kernels(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """qkit.runtime.vllm.kernels itself, in that vLLM on a CPU."""
    linear = sys.modules["vllm.model_executor.kernels.linear"]
    for name in ("MPLinearKernel", "Int8ScaledMMLinearKernel"):
        monkeypatch.setattr(linear, name, type(name, (Base,), {}), raising=False)
    for name in ("MPLinearLayerConfig", "Int8ScaledMMLinearLayerConfig"):
        monkeypatch.setattr(linear, name, Config, raising=False)
    envs, types = ModuleType("vllm.envs"), ModuleType("vllm.scalar_type")
    envs.environment_variables = variables()  # type: ignore[attr-defined]
    names = ("uint4b8", "uint8b128", "uint4", "uint8")
    types.scalar_types = type("Types", (), {name: name for name in names})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    monkeypatch.setitem(sys.modules, "vllm.scalar_type", types)
    cpu = type("Cpu", (), {"device_type": "cpu", "is_cpu": lambda self: True, "is_cuda": lambda self: False})()
    monkeypatch.setattr(sys.modules["vllm.platforms"], "current_platform", cpu)
    monkeypatch.delitem(sys.modules, "qkit.runtime.vllm.kernels")
    return importlib.import_module("qkit.runtime.vllm.kernels")


def layer_of(**tensors: torch.Tensor | None) -> torch.nn.Module:
    """A layer with these parameters; the outputs are where the name of the first says."""
    layer = torch.nn.Module()
    for name, tensor in tensors.items():
        if tensor is not None:
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
            getattr(layer, name).output_dim = 0 if "weight_packed" in tensors else 1
    return layer


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False)])
def test_a_weight_is_not_held_in_two_layouts_for_longer_than_it_takes(
    kernels: Any, layout: str, bits: int, zeros: bool
) -> None:
    out, in_, group = 256, 1024, 128
    packed = torch.randint(-(2**31), 2**31 - 1, (out, in_ * bits // 32), dtype=torch.int32)
    scale = torch.rand(out, in_ // group).bfloat16() / 100
    zero = torch.randint(0, 2**bits, (out, in_ // group), dtype=torch.uint8) if zeros else None
    words = pack(zero.t().contiguous(), bits) if zero is not None else None  # [groups, out * bits / 32]
    if layout == "gptq":
        layer = layer_of(qweight=packed.t().contiguous(), scales=scale.t().contiguous(), qzeros=words)
    else:
        turned = None if words is None else words.t().contiguous()
        layer = layer_of(weight_packed=packed.clone(), weight_scale=scale.clone(), weight_zero_point=turned)
    kind = {(4, False): "uint4b8", (4, True): "uint4", (8, False): "uint8b128"}[bits, zeros]
    config = Config((in_, out), kind, group_size=group, zero_points=zeros)
    assert kernels.QkitLinearKernel.can_implement(config) == (True, None)
    names = [name for name, _ in layer.named_parameters()]
    kernel = kernels.QkitLinearKernel(config, *names)
    took = most(kernel.process_weights_after_loading, layer, held=layer.parameters)
    assert took <= 2.4 * packed.nbytes  # the weight and its layout, a little for scales
    assert all(p.numel() == 0 for p in layer.parameters())
    x = torch.randn(3, in_).bfloat16()
    exact = reference.matmul(x.float(), Weight(packed, scale, zero, bits, in_))
    assert float((kernel.apply_weights(layer, x).float() - exact).norm() / exact.norm()) < 0.01
    assert "1 linears on cpu" in factors(sys.modules["vllm.envs"].environment_variables)["QKIT_KERNELS"]


@pytest.mark.parametrize("channelwise", [True, False])
def test_int8_weights(kernels: Any, channelwise: bool) -> None:
    out, in_ = 256, 1024
    codes = torch.randint(-127, 128, (out, in_), dtype=torch.int8)
    scale = torch.rand(out if channelwise else 2, 1) / 100
    layer = layer_of(weight=codes.clone(), weight_scale=scale.clone())
    layer.logical_widths, layer.params_dtype = [100, 156], torch.bfloat16
    kernel = kernels.QkitInt8LinearKernel(Config(is_channelwise=channelwise), "weight", "weight_scale")
    took = most(kernel.process_weights_after_loading, layer, held=layer.parameters)
    assert took <= 2.1 * codes.nbytes and layer.weight.numel() == 0
    rows = scale if channelwise else scale.repeat_interleave(torch.tensor([100, 156]), 0)
    x = torch.randn(3, in_).bfloat16()
    exact = x.float() @ (codes.float() * rows).t()
    assert float((kernel.apply_weights(layer, x).float() - exact).norm() / exact.norm()) < 0.02
