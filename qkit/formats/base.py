"""What every on-disk format offers. Formats are pure: local tensor names in and out, inputs never modified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ..dtypes import TensorMeta
from ..scheme import QTensor, Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class Format(Protocol):
    """One on-disk format. `name` is what the user types; local names are suffixes such as "weight_packed"."""

    name: str

    def scheme_for(self, scheme: Scheme, model_dtype: str) -> Scheme:
        """`scheme` with what the format dictates filled in (scale dtype, least zero point).

        Raises QkitError, with the remedy, where the format cannot hold it."""
        ...

    def check(self, shape: tuple[int, int], scheme: Scheme) -> str | None:
        """Why a [out, in] weight cannot be stored in this format, or None (e.g. GPTQ: in and out % 32)."""
        ...

    def out_metas(self, shape: tuple[int, int], scheme: Scheme) -> dict[str, TensorMeta]:
        """Local name -> dtype and shape of every tensor `pack` will return, in writing order."""
        ...

    def pack(self, q: QTensor) -> dict[str, torch.Tensor]:
        """The tensors on disk for one weight, keyed by local name."""
        ...

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
        """The inverse of `pack`, exactly."""
        ...

    def config(self, schemes: Mapping[str, Scheme], ignored: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
        """The `quantization_config`. schemes: module name -> Scheme for each quantized module; ignored: names
        of the linear modules left alone; options: method facts (damp_percent, desc_act, ...)."""
        ...

    def parse(self, quantization_config: Mapping[str, Any]) -> Any:
        """A reader for a folder in this format: see `formats.reader`."""
        ...
