"""*nvfp4-pack-quantized* and *mxfp4-pack-quantized*: E2M1 weights, two in a byte, the first in the low nibble.

NVFP4: weight_scale F8_E4M3 per 16 inputs, weight_global_scale F32 [1], by which the scales are divided. MXFP4:
weight_scale U8 per 32 inputs, an exponent of two (E8M0). Reference: compressors/nvfp4, compressors/mxfp4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import QkitError
from ...spec import Activations, LayerSpec, mxfp4, nvfp4
from ...spec.dtypes import TensorMeta
from ..base import check_tensors

if TYPE_CHECKING:
    import torch

    from ...kernels.weight import Weight


@dataclass(frozen=True)
class Fp4:
    """NAME: the format's; kind: of its weights."""

    NAME: str
    kind: str
    OPTIONAL: tuple[str, ...] = ("input_global_scale",)

    @property
    def _nv(self) -> bool:
        return self.kind == "nvfp4"

    def required(self, spec: LayerSpec) -> tuple[str, ...]:
        names = ("weight_packed", "weight_scale")
        return (*names, "weight_global_scale") if self._nv else names

    def check(self, shape: tuple[int, int], spec: LayerSpec) -> str | None:
        size = spec.group_size
        return f"groups of {size} do not divide its {shape[1]} inputs" if shape[1] % size else None

    def metas(self, shape: tuple[int, int], spec: LayerSpec) -> dict[str, TensorMeta]:
        out, in_ = shape
        found = {
            "weight_packed": TensorMeta("U8", (out, in_ // 2)),
            "weight_scale": TensorMeta("F8_E4M3" if self._nv else "U8", (out, in_ // spec.group_size)),
        }
        if self._nv:
            found["weight_global_scale"] = TensorMeta("F32", (1,))
        return found

    def pack(self, weight: Weight, spec: LayerSpec) -> dict[str, torch.Tensor]:
        import torch

        # Packed words hold eight codes, low bits first: as bytes they are what the format stores.
        packed = weight.packed.contiguous().view(torch.uint8).view(weight.out_features, -1)
        tensors = {"weight_packed": packed[:, : weight.in_features // 2].contiguous(), "weight_scale": weight.scale}
        if self._nv:
            tensors["weight_global_scale"] = torch.tensor([1.0 / weight.multiplier], dtype=torch.float32)
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> Weight:
        import torch

        from ...kernels.weight import Weight

        packed = tensors["weight_packed"]
        if packed.dim() != 2:
            raise QkitError(f"weight_packed has shape {list(packed.shape)}, not two dimensions")
        shape = (packed.shape[0], packed.shape[1] * 2)
        reason = self.check(shape, spec)
        if reason:
            raise QkitError(reason)
        check_tensors(tensors, self.metas(shape, spec))
        multiplier = 1.0
        if self._nv:
            given = float(tensors["weight_global_scale"])
            if not given > 0:
                raise QkitError(f"weight_global_scale is {given}", "the checkpoint is damaged")
            multiplier = 1.0 / given
        words = packed.contiguous().view(torch.int32)
        return Weight(words, tensors["weight_scale"], None, 4, shape[1], self.kind, multiplier)

    def arguments(self, spec: LayerSpec) -> dict[str, Any]:
        """`weights` of a config group."""
        return {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group" if self._nv else "group",
            "group_size": spec.group_size, "dynamic": False, "actorder": None,
            "scale_dtype": "torch.float8_e4m3fn" if self._nv else "torch.uint8",
        }  # fmt: skip

    def parse(self, name: str, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> LayerSpec:
        """The spec of a config group's `weights` and `input_activations`. Raises QkitError for what is not read."""
        spec = nvfp4() if self._nv else mxfp4()
        bits, kind, size = (weights.get(key) for key in ("num_bits", "type", "group_size"))
        if bits != 4 or kind != "float" or size not in (spec.group_size, None):
            raise QkitError(
                f"config group {name!r}: {bits}-bit {kind} weights in groups of {size} are not {self.NAME}",
                f"supported: 4-bit float weights in groups of {spec.group_size}",
            )
        if not inputs:
            return spec
        bits = inputs.get("num_bits", 4)
        return replace(spec, input=Activations("float", int(bits), bool(inputs.get("dynamic")), "tensor"))


NVFP4 = Fp4("nvfp4-pack-quantized", "nvfp4")
MXFP4 = Fp4("mxfp4-pack-quantized", "mxfp4")
