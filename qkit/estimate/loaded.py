"""A model's weights as an engine holds them once it is loaded, where that is not how they are stored."""

from __future__ import annotations

from dataclasses import replace

from ..spec import LayerSpec
from ..spec.dtypes import ITEMSIZE
from .parts import Part, Weights
from .subject import Subject
from .weights import of_architecture

_EXPANDING = ("qkit", "transformers")  # engines that make plain matrices of GGUF files
_PLAIN = ("BF16", "F16", "F32")


def as_loaded(found: Subject, engine: str, device_kind: str) -> Subject:
    """The same model as `engine` holds it on a device of that kind ("cpu", "gpu").

    qkit and transformers expand GGUF files to the model's type. qkit's kernels on CPUs take 4 or 8 bits a code, a scale
    for each output and group, and a byte for each zero point."""
    if found.container == "gguf" and engine in _EXPANDING:
        return replace(
            found,
            weights=of_architecture(found.arch, None, "safetensors", found.dtype),
            stored=f"{found.stored}, expanded to {found.dtype}",
            container="safetensors",
            spec=None,
            basis=f"shapes of the architecture in {found.dtype}, to which {engine} expands GGUF files",
        )
    if engine == "qkit" and device_kind == "cpu" and found.spec is not None:
        parts = tuple(_packed(part, found.spec) if part.quantized else part for part in found.weights.parts)
        return replace(found, weights=Weights(parts))
    return found


def _packed(part: Part, spec: LayerSpec) -> Part:
    codes = part.values * 8 // spec.bits
    wide = ITEMSIZE[spec.scale.dtype] if spec.scale.dtype in _PLAIN and spec.scale.over is None else 4
    # Zero points of 2 and 3 bits are held even where they are the middle, which no 4-bit kernel takes for granted.
    zero = 1 if spec.kind == "int" and (not spec.symmetric or spec.bits < 4) else 0
    size = spec.group_size
    scales = -(-codes // size) * (wide + zero) if size else part.scales
    return replace(part, values=codes * (8 if spec.bits > 4 else 4) // 8, scales=scales)
