"""How a weight is stored: `Scheme`, the presets users name, and `QTensor`, the format-neutral result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import QkitError

if TYPE_CHECKING:
    import torch

CHANNEL = 0  # group_size of a scheme with one scale per output channel
AUTO_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Scheme:
    """Integer weight-only quantization of a [out, in] weight: w ~ (code - zero) * scale.

    bits         4 or 8; codes are unsigned, 0 .. 2**bits - 1
    group_size   input channels that share a scale; CHANNEL (0): one scale per output channel
    symmetric    zero is 2**(bits-1) everywhere and is not stored
    scale_dtype  stored type of the scale, "BF16", "F16" or "F32"; quantizers round to it (`round_scale`)
                 *before* they choose codes
    min_zero     least zero point the format can hold (GPTQ v1 stores zero - 1, so 0 has no form there)
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_dtype: str = "BF16"
    min_zero: int = 0
    kind: str = "int"

    def __post_init__(self) -> None:
        if self.kind != "int":
            raise QkitError(f"unknown scheme kind {self.kind!r}", "known kinds: int")
        if self.bits not in (4, 8):
            raise QkitError(f"{self.bits}-bit integer weights are not supported", "use 4 or 8 bits")
        if self.group_size != CHANNEL and (self.group_size < 16 or self.group_size % 8):
            raise QkitError(
                f"group size {self.group_size} is not usable",
                "use a multiple of 8, at least 16 (128, 64 and 32 are usual), or 'channel'",
            )
        if self.scale_dtype not in ("BF16", "F16", "F32"):
            raise QkitError(f"scale dtype {self.scale_dtype!r} is not supported", "use BF16, F16 or F32")
        if self.min_zero not in (0, 1):
            raise QkitError(f"min_zero must be 0 or 1, not {self.min_zero}")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def mid(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Number of groups along the input; raises ValueError where the group size does not divide it."""
        if self.group_size == CHANNEL:
            return 1
        if in_features % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide {in_features}")
        return in_features // self.group_size

    def describe(self) -> str:
        group = "channel" if self.group_size == CHANNEL else f"g{self.group_size}"
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {group}"


# None: keep the source's values (an export, with a GGUF source dequantized).
PRESETS: dict[str, Scheme | None] = {
    "w4a16": Scheme(bits=4),
    "w4a16-asym": Scheme(bits=4, symmetric=False),
    "w8a16": Scheme(bits=8),
    "w8a16-asym": Scheme(bits=8, symmetric=False),
    "none": None,
}


def preset(name: str) -> Scheme | None:
    """The scheme a user named; raises QkitError listing the known ones."""
    key = name.lower().replace("_", "-")
    if key not in PRESETS:
        raise QkitError(f"unknown scheme {name!r}", "known schemes: " + ", ".join(PRESETS))
    return PRESETS[key]


@dataclass(frozen=True)
class QTensor:
    """A quantized [out, in] weight, unpacked and format-neutral. w ~ (codes - zero) * scale.

    codes  uint8 [out, in], 0 .. 2**bits - 1
    scale  scheme.scale_dtype [out, groups]; may be negative (the sign is free: the group's largest weight
           may then land on either end of the grid); never zero, never NaN
    zero   uint8 [out, groups], or None where symmetric (2**(bits-1))
    Group j covers input columns j*group_size .. (j+1)*group_size - 1 (g_idx is trivial).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: Scheme

    def __post_init__(self) -> None:
        out, in_ = self.codes.shape
        expected = (out, self.scheme.groups(in_))
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale has shape {tuple(self.scale.shape)}, expected {expected}")
        if self.scheme.symmetric != (self.zero is None):
            raise ValueError("a symmetric scheme has no zero, an asymmetric one needs it")
        if self.zero is not None and tuple(self.zero.shape) != expected:
            raise ValueError(f"zero has shape {tuple(self.zero.shape)}, expected {expected}")

    def rows(self, start: int, stop: int) -> QTensor:
        """Outputs start .. stop-1, as views."""
        zero = None if self.zero is None else self.zero[start:stop]
        return QTensor(self.codes[start:stop], self.scale[start:stop], zero, self.scheme)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[out, in] in `dtype` (default float32); computed in float32, rounded once."""
        import torch

        from ..kernels import reference

        return reference.dequantize(self.codes, self.scale, self.zero, self.scheme.bits, dtype or torch.float32)


def round_scale(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """`scale` (float32, any shape) as the scheme stores it.

    float16 scales go through bfloat16 first: engines read them in the model's own dtype, most often
    bfloat16, and a value on both grids means the same number in every one of them.
    """
    from ..kernels import reference
    from .dtypes import torch_dtype

    return reference.round_scale(scale, torch_dtype(scheme.scale_dtype))


def with_group_size(scheme: Scheme, group_size: int) -> Scheme:
    return replace(scheme, group_size=group_size)
