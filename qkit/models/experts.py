"""Mixture-of-experts blocks with one `nn.Linear` per expert matrix, named as checkpoints name them.

transformers 5 keeps the experts of a block in two 3-D parameters; checkpoints on disk hold one matrix per
expert, and that matrix is what a quantizer quantizes and what a packed linear replaces.
"""

from __future__ import annotations

import torch
from torch import nn

# model_type -> names of an expert's gate, up and down matrices, and of the block within a decoder layer.
EXPERT_NAMES = {
    "mixtral": (("w1", "w3", "w2"), "block_sparse_moe"),
    "qwen2_moe": (("gate_proj", "up_proj", "down_proj"), "mlp"),
    "qwen3_moe": (("gate_proj", "up_proj", "down_proj"), "mlp"),
}


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) * up(x)), children under the checkpoint's names."""

    def __init__(self, hidden: int, intermediate: int, act: nn.Module, names: tuple[str, str, str]):
        super().__init__()
        gate, up, down = names
        self.names = names
        self.act_fn = act
        self.add_module(gate, nn.Linear(hidden, intermediate, bias=False, device="meta"))
        self.add_module(up, nn.Linear(hidden, intermediate, bias=False, device="meta"))
        self.add_module(down, nn.Linear(intermediate, hidden, bias=False, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Experts(nn.ModuleList):
    """Drop-in for the fused experts of transformers 5 (`MixtralExperts`, `Qwen3MoeExperts`, ...).

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


def unfuse(model: nn.Module, model_type: str) -> None:
    """Swap every fused experts module in `model` for `Experts`, in place; parameters stay on meta.

    Afterwards parameter names are those of the checkpoint. Mixtral's block is `mlp` to transformers' code and
    `block_sparse_moe` on disk: the block is registered under the second name and reachable as the first.
    """
    if model_type not in EXPERT_NAMES:
        return
    names, block_name = EXPERT_NAMES[model_type]
    for layer in model.get_decoder().layers:  # type: ignore[operator, union-attr]
        block = layer.mlp
        fused = getattr(block, "experts", None)
        if fused is None:  # a dense layer among sparse ones
            continue
        count, hidden, intermediate = fused.down_proj.shape
        dtype = fused.down_proj.dtype
        experts = (Expert(hidden, intermediate, fused.act_fn, names).to(dtype) for _ in range(count))
        block.experts = Experts(experts)
        if block_name != "mlp":
            del layer.mlp
            layer.add_module(block_name, block)
            object.__setattr__(layer, "mlp", block)
