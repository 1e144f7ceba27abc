"""Round to nearest: no data needed, one pass over the weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..kernels.weight import Blocks, Weight
from ..spec import LayerSpec
from ..spec.dtypes import dtype_name
from . import floats
from .base import Method, Quantized
from .tables import int8, table_codes

if TYPE_CHECKING:
    import torch

# Clip search: the scale of every group is tried at these multiples of the one that spans the group. Below 1 the
# outliers are clipped and the rest get a finer grid; a little above 1 helps where rounding the span was unlucky.
_POSITIVE = tuple(round(0.5 + 0.025 * k, 3) for k in range(25))
# A symmetric grid has one value more below zero than above: a negative scale gives it to the other tail.
_EITHER_SIGN = (*_POSITIVE, *(-m for m in _POSITIVE))


class NonFiniteWeight(QkitError):
    """The weight holds NaN or infinity; the caller knows which tensor it is and says so."""


class Rtn(Method):
    """Needs no data. Option clip_search: search each group's scale for the least error."""

    name: ClassVar[str] = "rtn"
    options: ClassVar[tuple[str, ...]] = ("clip_search",)
    kinds: ClassVar[tuple[str, ...]] = ("int", "ggml", "nf4", "fp4", "llm.int8", "fp8", "nvfp4", "mxfp4")
    narrow: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True

    def whole(self, spec: LayerSpec) -> bool:
        """A scale of all weights, or scales that are themselves quantized together."""
        return spec.kind == "nvfp4" or spec.scale.over is not None or spec.scale.block == (0, 0)

    def quantize(
        self, weights: Sequence[torch.Tensor], statistic: Any, specs: Sequence[LayerSpec], **options: Any
    ) -> list[Quantized]:
        return [self._one(w, spec, options) for w, spec in zip(weights, specs, strict=True)]

    def _one(self, w: torch.Tensor, spec: LayerSpec, options: dict[str, Any]) -> Quantized:
        from .. import kernels

        if spec.kind == "int" and spec.grid.low is None:
            weight, squared = quantize_squared(w, spec, **options)
            return Quantized(weight, self.name, squared)
        if spec.kind == "ggml":
            packed, squared = blocks(w, spec)
            return Quantized(packed, self.name, squared)
        if not kernels.all_finite(w):
            raise _non_finite(w)
        return Quantized(self._rounded(w, spec), self.name)

    def _rounded(self, w: torch.Tensor, spec: LayerSpec) -> Weight:
        if spec.kind in ("nf4", "fp4"):
            return table_codes(w, spec)
        if spec.kind == "llm.int8":
            return int8(w)
        if spec.kind == "int":
            return floats.narrow_int8(w, spec)
        if spec.kind == "fp8":
            return floats.fp8(w, spec)
        return floats.nvfp4(w) if spec.kind == "nvfp4" else floats.mxfp4(w)


def blocks(
    w: torch.Tensor, spec: LayerSpec, importance: torch.Tensor | None = None
) -> tuple[Blocks, tuple[float, float]]:
    """w float [out, in] in the block type of `spec`. importance [in]: what an error in each input costs, or None.
    Returns the blocks and (|w - decoded|^2, |w|^2).

    Raises NonFiniteWeight for NaN or infinity, QkitError where a scale does not fit float16."""
    from .. import kernels
    from ..kernels import ggml

    if dtype_name(w.dtype) not in ("F32", "F16", "BF16"):
        w = w.float()
    try:
        packed, lost, total = ggml.encode_with_error(w.cpu(), spec.grid.block, importance)
        return Blocks.of(packed, spec.grid.block), (lost, total)
    except kernels.NonFiniteError as e:
        raise _non_finite(w) from e
    except kernels.ScaleOverflowError as e:
        raise QkitError(
            f"the weight's range does not fit the float16 scales of {spec.grid.block} "
            f"(largest magnitude {float(w.abs().max()):.3g})",
            "use another format",
        ) from e


def _non_finite(w: torch.Tensor) -> NonFiniteWeight:
    kind = "NaN" if bool(w.isnan().any()) else "infinite values"
    return NonFiniteWeight(
        f"the weight contains {kind}", "the checkpoint is damaged, or was saved from a run that diverged"
    )


def quantize(w: torch.Tensor, scheme: LayerSpec, clip_search: bool = False) -> Weight:
    """`quantize_with_error` without the error."""
    return quantize_with_error(w, scheme, clip_search)[0]


def quantize_with_error(w: torch.Tensor, scheme: LayerSpec, clip_search: bool = False) -> tuple[Weight, float]:
    """`quantize_squared`, and the relative error |w - dequantized| / |w| (0.0 for an all-zero weight)."""
    weight, (lost, total) = quantize_squared(w, scheme, clip_search)
    return weight, math.sqrt(lost / total) if total else 0.0


def quantize_squared(
    w: torch.Tensor, scheme: LayerSpec, clip_search: bool = False
) -> tuple[Weight, tuple[float, float]]:
    """w float [out, in] on the grid of `scheme`, every code the nearest one.

    The grid spans each group exactly (`kernels.reference.grid`). With clip_search each group takes the
    scale, out of 25 multiples between 0.5 and 1.1 (symmetric: of either sign), that leaves the least squared error;
    the spanning scale is a candidate, so no group gets worse.

    Returns the tensor and (|w - dequantized|^2, |w|^2), Frobenius norms.
    Raises NonFiniteWeight for NaN or infinity, QkitError where a scale does not fit scheme.scale_dtype, ValueError
    where the group size does not divide in.
    """
    from .. import kernels
    from ..kernels.codes import weight_of

    if dtype_name(w.dtype) not in ("F32", "F16", "BF16"):
        w = w.float()
    groups = scheme.groups(w.shape[1])
    size = 0 if groups == 1 else scheme.group_size
    multipliers = () if not clip_search else _EITHER_SIGN if scheme.symmetric else _POSITIVE
    try:
        codes, scale, zero, error, norm = kernels.quantize_rtn(
            w, scheme.bits, size, scheme.symmetric, scheme.scale_dtype, scheme.min_zero, multipliers
        )
    except kernels.NonFiniteError as e:
        raise _non_finite(w) from e
    except kernels.ScaleOverflowError as e:
        raise QkitError(
            f"the weight's range does not fit {scheme.scale_dtype} scales "
            f"(largest magnitude {float(w.abs().max()):.3g})",
            "store the scales as BF16 or F32",
        ) from e
    return weight_of(codes, scale, zero, scheme.bits), (error, norm)
