"""Quantized experts on CPUs in vLLM: compressed-tensors with 4- and 8-bit weights. Imported by `vllm_plugin`.

vLLM takes the kernels of linears from tables; those of experts from an enumeration in its own code
(fused_moe/oracle/int_wna16.py), whose only entries for CPUs need AMX. What a plug-in can replace is the config class of
a quantization method (`register_quantization_config`, which says that it overwrites). `QkitCompressedTensorsConfig` is
vLLM's own class but for the experts that our kernels take; every other layer gets what it would have got.
"""

from __future__ import annotations

import weakref
from fractions import Fraction
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as wna16,
)
from vllm.platforms import current_platform

from ...kernels import unpack
from ...kernels.select import Problem, Weight, select
from .. import opaque
from .kernels import first_reason, loading
from .measured import release


class QkitCompressedTensorsConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """vLLM's, but for the experts of `QkitExpertsMethod`."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if current_platform.is_cpu() and isinstance(layer, RoutedExperts):
            weights = self._expert_weights(layer, prefix)
            if weights is not None and _takes(layer, weights):
                return QkitExpertsMethod(weights, layer.moe_config)
        return super().get_quant_method(layer, prefix)

    def _expert_weights(self, layer: Any, prefix: str) -> Any:
        """How the experts' matrices are quantized; None unless weight-only, packed, and all in one way."""
        self._add_fused_moe_to_target_scheme_map()
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        schemes = [self.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names]
        first = schemes[0]
        if first is None or any(scheme != first for scheme in schemes) or first.get("format") != "pack-quantized":
            return None
        weights = first.get("weights")
        return weights if weights and self._is_wNa16_group_channel(weights, first.get("input_activations")) else None


def _takes(layer: Any, weights: Any) -> bool:
    moe = layer.moe_config
    if weights.num_bits not in (4, 8) or weights.actorder == "group" or moe.activation != MoEActivation.SILU:
        return False
    if layer.use_ep or layer.apply_router_weight_on_input or moe.has_bias or not moe.is_act_and_mul:
        return False
    wide = moe.intermediate_size_per_partition
    shapes = ((2 * wide, moe.hidden_dim), (moe.hidden_dim, wide))
    for out_features, in_features in shapes:
        group_size = weights.group_size if weights.strategy == "group" else in_features
        if in_features % group_size or in_features * weights.num_bits % 32 or out_features * weights.num_bits % 32:
            return False
        asked = Problem(
            kind="int",
            bits=weights.num_bits,
            group_size=group_size,
            symmetric=weights.symmetric,
            act_dtype=moe.in_dtype,
            activations=None,
            device=torch.device("cpu"),
            shape=(out_features, in_features),
        )
        if first_reason(asked) is not None:
            return False
    return True


class QkitExpertsMethod(wna16.CompressedTensorsWNA16MoEMethod):  # type: ignore[misc]
    """Its parameters and their loading are vLLM's, the computation is `opaque.experts`."""

    def __init__(self, weights: Any, moe: Any):
        # Not vLLM's own __init__, which looks for one of vLLM's kernels.
        FusedMoEMethodBase.__init__(self, moe)
        self.weight_quant = weights
        self.input_quant = None
        self.symmetric = weights.symmetric
        self.num_bits = weights.num_bits
        self.packed_factor = Fraction(32, weights.num_bits)
        self.strategy = weights.strategy
        self.group_size = -1 if weights.group_size is None else weights.group_size
        loading.made += 1

    @property
    def is_monolithic(self) -> bool:
        return False  # vLLM routes, we compute

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None  # for vLLM's kernels

    def process_weights_after_loading(self, layer: Any) -> None:
        count, dtype = layer.local_num_experts, layer.params_dtype
        experts = []
        for number in range(count):
            pair = []
            for name in ("w13", "w2"):
                weight = self._weight(layer, name, number)
                kernel = select(weight, dtype)
                pair.append((kernel, kernel.prepack(weight, None)))
            experts.append((pair[0], pair[1]))
        parts = ("packed", "scale", "zero_point", "shape")
        release(layer, [f"{name}_weight_{part}" for name in ("w13", "w2") for part in parts])
        layer.qkit_handle = opaque.hold_experts(experts)
        layer.qkit_kernel = experts[0][0][0].name
        weakref.finalize(layer, opaque.release, layer.qkit_handle)
        loading.ours(layer.qkit_kernel, f"blocks of {count} experts")

    def _weight(self, layer: Any, name: str, number: int) -> Weight:
        packed = getattr(layer, f"{name}_weight_packed").data[number].clone()  # the whole is freed afterwards
        zero = None
        if not self.symmetric:
            words = getattr(layer, f"{name}_weight_zero_point").data[number].t().contiguous()
            zero = unpack(words, self.num_bits, packed.shape[0]).t().contiguous()
        scale = getattr(layer, f"{name}_weight_scale").data[number].clone()
        return Weight(packed, scale, zero, self.num_bits, packed.shape[1] * 32 // self.num_bits)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Shared experts are run by the caller: this method overlaps nothing with them."""
        return opaque.experts(x, layer.qkit_handle, topk_weights, topk_ids)
