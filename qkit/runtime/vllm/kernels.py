"""qkit's kernels as vLLM's linear kernel classes. Imported by `vllm_plugin`, inside vLLM only.

Written for vLLM 0.32: model_executor/kernels/linear (`MPLinearKernel`, `Int8ScaledMMLinearKernel`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from vllm.envs import environment_variables
from vllm.model_executor.kernels import linear as table
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from ...kernels import pack, unpack
from ...kernels.select import KERNELS, Problem, Weight, select
from .. import opaque
from .loading import Loading
from .measured import release

# vLLM's name of what a code stands for -> (bits, whether there are no zero points)
_TYPES = {
    scalar_types.uint4b8: (4, True),
    scalar_types.uint8b128: (8, True),
    scalar_types.uint4: (4, False),
    scalar_types.uint8: (8, False),
}


loading = Loading(environment_variables)


def first_reason(problem: Problem) -> str | None:
    """None where one of qkit's kernels beside the reference supports `problem`, else why they do not."""
    reasons = []
    for kernel in KERNELS:
        if kernel.name == "reference":
            continue
        reason = kernel.supports(problem)
        if reason is None:
            return None
        reasons.append(f"{kernel.name}: {reason}")
    return "; ".join(reasons)


def _attach(layer: torch.nn.Module, weight: Weight, dtype: torch.dtype, activations: str | None) -> None:
    """Give `layer` the prepacked weight."""
    kernel = select(weight, dtype, activations)
    # A plain attribute, neither parameter nor buffer: nothing moves it to another device.
    layer.qkit_handle = opaque.hold(kernel, kernel.prepack(weight, activations))
    layer.qkit_out_features = weight.out_features
    layer.qkit_kernel = kernel.name
    weakref.finalize(layer, opaque.release, layer.qkit_handle)
    loading.ours(kernel.name)


def _apply(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return opaque.linear(x, layer.qkit_handle, layer.qkit_out_features, bias)  # type: ignore[arg-type]


class QkitLinearKernel(MPLinearKernel):
    """4- and 8-bit weights, 16-bit (or float32) activations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        loading.made += 1

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # vLLM asks on CUDA only: bfloat16 and asynchronous copies

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type not in _TYPES:
            return False, f"qkit has kernels for {', '.join(map(str, _TYPES))}, not {c.weight_type}"
        bits, symmetric = _TYPES[c.weight_type]
        if symmetric == c.zero_points or getattr(c, "has_g_idx", False):
            return False, "zero points with a signed type, or act-order"
        if c.out_type not in (None, c.act_type):
            return False, f"results of {c.act_type} inputs are {c.act_type}, not {c.out_type}"
        in_features, out_features = c.partition_weight_shape
        group_size = in_features if c.group_size == -1 else c.group_size
        if group_size < 1 or in_features % group_size or in_features * bits % 32:
            return False, f"{in_features} inputs in groups of {group_size}"
        reason = first_reason(
            Problem(
                kind="int",
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                act_dtype=c.act_type,
                activations=None,
                device=torch.device(current_platform.device_type),
                shape=(out_features, in_features),
            )
        )
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight = self._weight(layer)
        release(layer, (self.w_q_name, self.w_s_name, self.w_zp_name))
        _attach(layer, weight, self.config.act_type, None)

    def _weight(self, layer: torch.nn.Module) -> Weight:
        """Three layouts arrive here: compressed-tensors' [out, in / 8], GPTQ's [in / 8, out], and AWQ's, which vLLM
        has turned into GPTQ's with compressed-tensors' zero points. The parameters say which dimension is which."""
        bits, symmetric = _TYPES[self.config.weight_type]
        codes, scale, zero = self._get_weight_params(layer)
        packed = _rows(codes)
        return Weight(
            packed,
            _rows(scale),
            None if symmetric or zero is None else _zero(zero, bits, packed.shape[0]),
            bits,
            self.config.partition_weight_shape[0],
        )

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _apply(layer, x, bias)


def _rows(parameter: Any) -> torch.Tensor:
    """One of vLLM's packed weights or scales with the outputs in dimension 0."""
    data: torch.Tensor = parameter.data
    return (data if parameter.output_dim == 0 else data.t()).contiguous()


def _zero(parameter: Any, bits: int, out_features: int) -> torch.Tensor:
    """vLLM's zero points, int32 packed along the outputs -> uint8 [out, groups]."""
    by_group = parameter.data.t() if parameter.output_dim == 0 else parameter.data
    words = -(-out_features * bits // 32)
    return unpack(by_group[:, :words].contiguous(), bits, out_features).t().contiguous()


class QkitInt8LinearKernel(Int8ScaledMMLinearKernel):
    """int8 weights with a scale per output (or per tensor), activations quantized to int8 per token as they come.

    vLLM asks before it knows the layer's shape. A shape that none of our kernels takes goes to the kernel that vLLM
    would have chosen without us."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        loading.made += 1
        self._other: Int8ScaledMMLinearKernel | None = None

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if current_platform.is_cpu():
            return True, None
        if current_platform.is_cuda() and (compute_capability is None or compute_capability >= 80):
            return True, None
        return False, "runs on CPUs, and on CUDA from capability 8.0"

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if c.is_static_input_scheme or not c.input_symmetric:
            return False, "quantizes activations per token and symmetrically"
        # Any shape will do to learn whether there is a kernel at all.
        shape = Problem(
            kind="int",
            bits=8,
            group_size=4096,
            symmetric=True,
            act_dtype=torch.bfloat16,
            activations="int8",
            device=torch.device(current_platform.device_type),
            shape=(4096, 4096),
        )
        reason = first_reason(shape)
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        codes = self._get_layer_params(layer)[0]
        out_features, in_features = codes.shape
        dtype = getattr(layer, "params_dtype", None) or torch.get_default_dtype()
        problem = Problem("int", 8, in_features, True, dtype, "int8", codes.device, (out_features, in_features))
        if first_reason(problem) is not None:
            self._other = self._next()
            self._other.process_weights_after_loading(layer)
            loading.theirs(type(self._other).__name__)
            return
        del codes  # what is held goes on lying beside its prepacked self
        weight = self._weight(layer)
        release(layer, self.layer_param_names[:2])
        _attach(layer, weight, dtype, "int8")

    def _weight(self, layer: torch.nn.Module) -> Weight:
        codes, scale, *_ = self._get_layer_params(layer)
        out_features, in_features = codes.shape
        if not self.config.is_channelwise:  # one scale for each of the merged layers
            widths = torch.tensor(layer.logical_widths, device=scale.device)
            scale = scale.data.reshape(-1).repeat_interleave(widths)
        unsigned = codes.data.view(torch.uint8).bitwise_xor_(0x80)  # in place: it is let go next
        return Weight(
            pack(unsigned.contiguous(), 8), scale.data.reshape(out_features, 1).contiguous(), None, 8, in_features
        )

    def _next(self) -> Int8ScaledMMLinearKernel:
        """The kernel that vLLM would take if ours were not in its table. Raises ValueError where there is none."""
        line = table._POSSIBLE_INT8_KERNELS[current_platform._enum]
        for other in line[line.index(type(self)) + 1 :]:
            if table.is_supported_and_can_implement_kernel(other, self.config, None)[0]:
                return other(self.config, self.layer_param_names)
        raise ValueError("no int8 kernel takes this layer, neither qkit's nor vLLM's")

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._other is not None:
            return self._other.apply_weights(layer, x, bias)
        return _apply(layer, x, bias)
