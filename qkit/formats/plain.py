"""Unquantized safetensors: an export of the source's own values (a GGUF dequantized, a LoRA merged)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import QkitError
from ..spec.dtypes import TensorMeta
from ..spec.scheme import QTensor, Scheme
from .base import FormatReader, Packed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Plain:
    """Holds no quantized weight: every scheme is refused, and there is no quantization_config."""

    name: str = "safetensors"

    def scheme_for(self, scheme: Scheme, model_dtype: str) -> Scheme:
        raise QkitError(
            f"format safetensors keeps weights as they are and cannot hold {scheme.describe()}",
            "use scheme 'none', or format compressed-tensors or gptq",
        )

    def check(self, shape: tuple[int, int], scheme: Scheme) -> str | None:
        return "format safetensors holds no quantized weights"

    def out_metas(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorMeta]:
        _refuse()

    def pack(self, q: QTensor) -> dict[str, torch.Tensor]:
        _refuse()

    def to_packed(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> Packed:
        _refuse()

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
        _refuse()

    def config(self, schemes: Mapping[str, Scheme], ignored: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
        """Empty: such a folder has no quantization_config."""
        return {}

    def parse(self, quantization_config: Mapping[str, Any]) -> FormatReader:
        _refuse()


def _refuse() -> NoReturn:
    raise ValueError("format safetensors holds no quantized weights")
