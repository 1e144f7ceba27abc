"""Models with the fast step, and whether their forwards took it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qkit.runtime import QuantLinear, decoder, load


def steps_taken(monkeypatch: Any) -> list[bool]:
    """Grows by whether the step was taken, at every forward."""
    taken: list[bool] = []
    step = decoder._Runner.step

    def watched(self: Any, *args: Any) -> Any:
        out = step(self, *args)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(decoder._Runner, "step", watched)
    return taken


def packed(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model with packed 4-bit linears, from plain weights."""
    from qkit.kernels import pack, quantize_rtn
    from qkit.kernels.weight import Weight

    model = load(folder, device="cpu", dtype=dtype)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and ".layers." in name:
            codes, scale, zero, *_ = quantize_rtn(module.weight.detach(), 4, 32, False, "BF16")
            weight = Weight(pack(codes, 4), scale, zero, 4, module.in_features)
            model.set_submodule(name, QuantLinear(weight, None if module.bias is None else module.bias.detach()))
    return model


def own(model: Any) -> Any:
    """The model's own forward, whatever `attach` has put in its place."""
    plain = type(model).__mro__[1] if "_qkit_runner" in model.__dict__ else type(model)
    return plain.forward.__get__(model)


def error(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a - truth).norm() / truth.norm())
