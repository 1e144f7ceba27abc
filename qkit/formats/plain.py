"""Unquantized safetensors: an export of the source's own values (a GGUF dequantized, a LoRA merged)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from ..errors import QkitError
from ..spec import LayerSpec
from ..spec.dtypes import TensorMeta
from .base import Format, FormatReader

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight


@dataclass(frozen=True)
class Plain(Format):
    """Holds no quantized weight: every scheme is refused, and there is no quantization_config."""

    name: str = "safetensors"
    quant_method: ClassVar[str | None] = None
    kinds: ClassVar[tuple[str, ...]] = ()
    default_scheme: ClassVar[str] = "none"

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        raise QkitError(
            f"format safetensors keeps weights as they are and cannot hold {scheme.describe()}",
            "use scheme 'none', or format compressed-tensors or gptq",
        )

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        return "format safetensors holds no quantized weights"

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        _refuse()

    def pack(self, weight: Weight, scheme: LayerSpec | None = None, of: int | None = None) -> dict[str, torch.Tensor]:
        _refuse()

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec, rows: int | None = None) -> Weight:
        _refuse()

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Empty: such a folder has no quantization_config."""
        return {}

    def parse(self, quantization_config: Mapping[str, Any]) -> FormatReader:
        _refuse()


def _refuse() -> NoReturn:
    raise ValueError("format safetensors holds no quantized weights")
