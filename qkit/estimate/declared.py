"""The weights of a checkpoint of which there is a config alone: at the types that it declares, quantized or not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .. import formats
from ..errors import QkitError
from ..models.architecture import Architecture, Matrix
from ..models.config import model_dtype
from ..models.families import EXPECTED, why_kept
from ..spec import LayerSpec, Scale
from ..spec.dtypes import ITEMSIZE, TensorMeta
from ..spec.ggml import GGML
from .parts import Part, Weights
from .weights import read_of, small


def of_config(arch: Architecture, config: Mapping[str, Any]) -> tuple[Weights, LayerSpec | None]:
    """(the weights, the scheme of most quantized values). Raises QkitError for a quantization that is not read."""
    itemsize = ITEMSIZE[model_dtype(config)]
    reader = formats.reader(config)
    parts, values = [], Counter[LayerSpec]()
    for m in arch.matrices:
        spec = reader.scheme(m.name.replace(".*.", ".0.")) if reader and _quantizable(m, reader) else None
        if spec is None:
            parts.append(Part(m.role, m.numel * itemsize, 0, m.count, read_of(arch, m)))
            continue
        values[spec] += m.numel
        codes, scales = nbytes(m, spec)
        parts.append(Part(m.role, codes * m.count, scales * m.count, m.count, read_of(arch, m), quantized=True))
    main = values.most_common(1)
    return Weights.of([*parts, *small(arch, itemsize)]), main[0][0] if main else None


def _quantizable(m: Matrix, reader: formats.FormatReader) -> bool:
    if reader.format.whole_experts and m.role != "expert":  # what MXFP4 folders hold beside experts is not quantized
        return False
    if m.role in ("embedding", "tower", "router", "other"):
        return False
    reason = why_kept(f"{m.name.replace('.*.', '.0.')}.weight", TensorMeta("BF16", (m.out, m.inp)))
    return reason is None or (reason not in EXPECTED and m.role != "head")


def nbytes(m: Matrix, spec: LayerSpec) -> tuple[int, int]:
    """(bytes of codes, bytes of scales and zero points) of one of a place's matrices."""
    if spec.kind == "ggml":
        kind = GGML.get(spec.grid.block)
        if kind is None:
            raise QkitError(f"{spec.grid.block} is a mix of types, not one")
        return m.out * kind.row_bytes(m.inp), 0
    shape: tuple[int, int] = (m.out, m.inp)
    scale: Scale | None = spec.scale
    scales = 0
    while scale is not None:
        groups = scale.shape(shape)
        scales += math.prod(groups) * ITEMSIZE[scale.dtype]
        if scale is spec.scale and spec.kind == "int" and not spec.symmetric:
            scales += -(-math.prod(groups) * spec.bits // 8)
        shape, scale = (1, math.prod(groups)), scale.over
    return -(-m.out * m.inp * spec.bits // 8), scales
