"""Mixture-of-experts blocks with one `nn.Linear` per expert matrix, named as checkpoints name them.

transformers 5 keeps the experts of a block in two 3-D parameters; a quantizer quantizes one matrix of one expert, and
that is what a packed linear replaces.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .fused import LAYOUTS, Layout

# Families whose code is unfused here; fused files of others are sliced too, but not run.
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "llama4_text", "gpt_oss")


class Gated(nn.Module):
    """act(gate) * up."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act_fn = act

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.act_fn(gate) * up
        return product


class ClampedGate(nn.Module):
    """gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), both clamped to `limit`."""

    def __init__(self, alpha: float, limit: float):
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class Expert(nn.Module):
    """One gated MLP: down(combine(gate(x), up(x))), children under the checkpoint's names."""

    def __init__(self, hidden: int, intermediate: int, combine: nn.Module, names: tuple[str, str, str], bias: bool):
        super().__init__()
        gate, up, down = names
        self.names = names
        self.combine = combine
        self.add_module(gate, nn.Linear(hidden, intermediate, bias=bias, device="meta"))
        self.add_module(up, nn.Linear(hidden, intermediate, bias=bias, device="meta"))
        self.add_module(down, nn.Linear(intermediate, hidden, bias=bias, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        result: torch.Tensor = down(self.combine(gate(x), up(x)))
        return result


class Experts(nn.ModuleList):
    """Drop-in for the fused experts of transformers 5 (`MixtralExperts`, `GptOssExperts`, ...).

    call_all: call an expert that no token chose too, with an input of no tokens."""

    call_all = False

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        out = torch.zeros_like(hidden_states)
        for index in range(len(self)) if self.call_all else top_k_index.unique().tolist():
            token, position = torch.where(top_k_index == index)
            result = self[index](hidden_states[token]) * top_k_weights[token, position, None]
            out.index_add_(0, token, result.to(out.dtype))
        return out

    def routed(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What `forward` gives the experts: states [n, hidden], and for each expert which of them are its inputs."""
        return hidden_states, [torch.where(top_k_index == index)[0] for index in range(len(self))]


class ScaledExperts(Experts):
    """Llama 4's: every expert has all tokens, times their score for it, which is 0 where it was not chosen."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """hidden_states [experts * tokens, hidden] -> the same shape."""
        out = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            rows = self._rows(index, hidden_states)
            if len(rows) or self.call_all:
                out[rows] = expert(hidden_states[rows])
        return out

    def routed(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:  # type: ignore[override]
        rows = [self._rows(index, hidden_states) for index in range(len(self))]
        places = torch.arange(sum(len(own) for own in rows), device=hidden_states.device)
        return hidden_states[torch.cat(rows)], list(places.split([len(own) for own in rows]))

    def _rows(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = len(hidden_states) // len(self)
        return index * tokens + hidden_states[index * tokens : (index + 1) * tokens].any(-1).nonzero()[:, 0]


class Routed(nn.Module):
    """A router below the name that it has on disk: Granite's router.layer."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.layer = router

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


def decoder_of(model: nn.Module) -> Any:
    """The module that has the decoder blocks as `layers`; Llama 4's get_decoder finds another."""
    decoder = model.get_decoder()  # type: ignore[operator]
    return decoder if hasattr(decoder, "layers") else model.model


def unfuse(model: nn.Module, model_type: str, layers: Collection[int] | None = None) -> None:
    """Swap every fused experts module in `model`, or in those of its `layers`, for `Experts`, in place; parameters
    stay on meta.

    Afterwards parameter names are those of the checkpoint. Mixtral's block is `mlp` to transformers' code and
    `block_sparse_moe` on disk: the block is registered under the second name and reachable as the first.
    """
    if model_type not in FAMILIES:
        return
    layout = LAYOUTS[model_type]
    for index, layer in enumerate(decoder_of(model).layers):
        block = getattr(layer, layout.attribute)
        fused = getattr(block, "experts", None)
        if fused is None or (layers is not None and index not in layers):  # dense, or as it is on disk
            continue
        block.experts = _unfused(fused, layout, model_type)
        if model_type == "granitemoe":
            block.router = Routed(block.router)
        if layout.block != layout.attribute:
            delattr(layer, layout.attribute)
            layer.add_module(layout.block, block)
            object.__setattr__(layer, layout.attribute, block)


def _unfused(fused: Any, layout: Layout, model_type: str) -> Experts:
    count, hidden, intermediate = fused.down_proj.shape
    if layout.transposed:
        hidden, intermediate = intermediate, hidden
    combine = ClampedGate(fused.alpha, fused.limit) if model_type == "gpt_oss" else Gated(fused.act_fn)
    bias = hasattr(fused, "down_proj_bias")
    kind = ScaledExperts if model_type == "llama4_text" else Experts
    return kind(
        Expert(hidden, intermediate, combine, layout.names, bias).to(fused.down_proj.dtype) for _ in range(count)
    )
