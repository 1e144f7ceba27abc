"""`Weight`: a quantized matrix, the one type from method to format to kernel, whatever file it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qkit.spec.dtypes import dtype_name
from qkit.spec.ggml import GGML
from qkit.spec.layer import CHANNEL, Grid, LayerSpec, Scale, ggml

# What a 4-bit code stands for. nf4 and fp4: bitsandbytes (functional.py, create_normal_map and create_fp4_map); e2m1:
# OCP Microscaling 1.0, section 5.3.3 (sign in bit 3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": _FP4 + tuple(-v for v in _FP4),
    "mxfp4": _E2M1 + tuple(-v for v in _E2M1),
    "nvfp4": _E2M1 + tuple(-v for v in _E2M1),
}  # fmt: skip

KINDS = ("int", *TABLES, "fp8")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Nested:
    """Scales of scales, bitsandbytes' double quantization (functional.py, quantize_blockwise): a scale is
    table[code] * absmax[block] + offset, blocks running over the codes row by row.

    table float32 [256]; absmax float32 [ceil(codes / block)]
    """

    table: torch.Tensor
    absmax: torch.Tensor
    block: int
    offset: float

    def expand(self, codes: torch.Tensor) -> torch.Tensor:
        """The scales of uint8 codes, float32 in their shape."""
        flat = self.table[codes.flatten().int()]
        absmax = self.absmax.repeat_interleave(self.block)[: flat.numel()]
        return (flat * absmax + self.offset).view(codes.shape)


@dataclass(frozen=True)
class Weight:
    """A quantized weight [out, in_features]: value(code[o, i]) * scale[o // scale_rows, i // group].

    kind      "int": value = code - zero. "nf4", "fp4", "mxfp4", "nvfp4": value = TABLES[kind][code]. "fp8": the
              code is an e4m3 number
    packed    int32 [out, ceil(in * bits / 32)]: unsigned codes, low bits first (the layout of `reference`)
    scale     [ceil(out / scale_rows), groups], groups divides in. float32, float16 or bfloat16; "mxfp4": uint8, e8m0
              (2**(s - 127)); "nvfp4": float8_e4m3fn; with `nested`: uint8 codes
    zero      uint8 [out, groups], only for "int"; None: 2**(bits-1)
    multiplier  what every scale is multiplied by (nvfp4: 1 / weight_global_scale)
    scale_rows  outputs that share a row of scales: 1, 128 for FP8 blocks, out for a scale of the whole tensor
    nested    how the scales are themselves stored, or None
    order     int64 [in]: which input each column belongs to (activation order of GPTQ); None: column i to input i

    Kernels take weights as `plain` gives them.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    in_features: int
    kind: str = "int"
    multiplier: float = 1.0
    scale_rows: int = 1
    nested: Nested | None = None
    order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError, with the values, unless the tensors fit together."""
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown, expected one of {', '.join(KINDS)}")
        bits = (4, 8) if self.kind == "int" else (8,) if self.kind == "fp8" else (4,)
        if self.bits not in bits:
            raise ValueError(f"bits must be {' or '.join(map(str, bits))} for kind {self.kind!r}, not {self.bits}")
        scales = {"mxfp4": (torch.uint8,), "nvfp4": (torch.float8_e4m3fn,)}.get(self.kind, FLOATS)
        if self.nested is not None:
            scales = (torch.uint8,)
        check_matrix("packed", self.packed, (torch.int32,))
        check_matrix("scale", self.scale, scales)
        out, words = self.packed.shape
        if self.in_features < 1 or words != -(-self.in_features * self.bits // 32):
            raise ValueError(
                f"packed has shape {(out, words)}, but {self.in_features} {self.bits}-bit codes a row take "
                f"{-(-self.in_features * self.bits // 32)} words"
            )
        rows, groups = self.scale.shape
        if self.scale_rows < 1 or rows != -(-out // self.scale_rows) or groups < 1 or self.in_features % groups:
            raise ValueError(
                f"scale has shape {(rows, groups)}, which does not fit a weight of {out} x {self.in_features}"
            )
        if self.zero is not None:
            if self.kind != "int":
                raise ValueError(f"a weight of kind {self.kind!r} has no zero point")
            check_matrix("zero", self.zero, (torch.uint8,))
            if self.scale_rows != 1 or self.zero.shape != self.scale.shape:
                raise ValueError(f"zero has shape {tuple(self.zero.shape)}, scale {tuple(self.scale.shape)}")
        if self.order is not None and self.order.shape != (self.in_features,):
            raise ValueError(f"order has shape {tuple(self.order.shape)}, the weight {self.in_features} inputs")
        devices = {t.device for t in (self.packed, self.scale, self.zero) if t is not None}
        if len(devices) > 1:
            raise ValueError(f"the weight lies on more than one device: {', '.join(sorted(map(str, devices)))}")

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; in_features where there is one scale a row."""
        return self.in_features // self.scale.shape[1]

    @property
    def spec(self) -> LayerSpec:
        """How it is stored, in words. One group a row reads as one scale per output channel."""
        groups = self.scale.shape[1]
        tensor = self.scale_rows == self.out_features != 1 and groups == 1
        block = (0, 0) if tensor else (self.scale_rows, CHANNEL if groups == 1 else self.group_size)
        kind = "float" if self.kind in ("fp8", "mxfp4", "nvfp4") else self.kind
        over = Scale((0, 0), "F32") if self.kind == "nvfp4" else None
        if self.nested is not None:
            over = Scale((1, self.nested.block), "F32")
        dtype = "F8_E8M0" if self.kind == "mxfp4" else dtype_name(self.scale.dtype)
        return LayerSpec(Grid(kind, self.bits, self.zero is None), Scale(block, dtype, over))

    def rows(self, start: int, stop: int) -> Weight:
        """Outputs start .. stop-1: of a `plain` weight as views."""
        if self.nested is not None or self.scale_rows != 1:
            return self.plain().rows(start, stop)
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, packed=self.packed[start:stop], scale=self.scale[start:stop], zero=zero)

    def plain(self) -> Weight:
        """The same weight with a scale per output and group: scales of scales multiplied out (float32), blocks of
        outputs repeated."""
        scale = self.scale if self.nested is None else self.nested.expand(self.scale)
        if self.scale_rows != 1:
            scale = scale.repeat_interleave(min(self.scale_rows, self.out_features), 0)[: self.out_features]
        return self if scale is self.scale else replace(self, scale=scale, scale_rows=1, nested=None)

    def to(self, device: torch.device | str) -> Weight:
        zero = None if self.zero is None else self.zero.to(device)
        nested = self.nested
        if nested is not None:
            nested = replace(nested, table=nested.table.to(device), absmax=nested.absmax.to(device))
        order = None if self.order is None else self.order.to(device)
        return replace(
            self, packed=self.packed.to(device), scale=self.scale.to(device), zero=zero, nested=nested, order=order
        )

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def float_scale(self) -> torch.Tensor:
        """The scales as float32 [out, groups], the multiplier included."""
        if self.nested is not None or self.scale_rows != 1:
            return self.plain().float_scale()
        if self.kind == "mxfp4":
            # 255 is NaN in e8m0; 2**-127 is subnormal in float32 and exact.
            exponent = self.scale.int() - 127
            scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
            scale = torch.where(self.scale == 255, float("nan"), scale)
        else:
            scale = self.scale.float()
        return scale if self.multiplier == 1.0 else scale * self.multiplier


def check_matrix(name: str, t: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError for another type, ValueError unless there are two dimensions."""
    if t.dtype not in dtypes:
        raise TypeError(f"{name} is {t.dtype}, expected " + " or ".join(str(d) for d in dtypes))
    if t.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected two dimensions")


def stack_rows(parts: Sequence[Weight]) -> Weight:
    """The weight that has the outputs of all of `parts`, in order; they are alike but in that, with a scale per output
    and group."""
    if len(parts) == 1:
        return parts[0]
    zero = None if parts[0].zero is None else torch.cat([p.zero for p in parts if p.zero is not None])
    packed, scale = (torch.cat([getattr(p, name) for p in parts]) for name in ("packed", "scale"))
    return replace(parts[0], packed=packed, scale=scale, zero=zero)


@dataclass(frozen=True)
class Blocks(Weight):
    """A weight of ggml's blocks, as they lie in a GGUF file: `packed` is uint8 [out, bytes of a row], scales included.

    No kernel multiplies by it: it is decoded first (`codes.values_of`).
    """

    block: str = ""

    def __post_init__(self) -> None:
        check_matrix("packed", self.packed, (torch.uint8,))
        if self.packed.shape[1] != GGML[self.block].row_bytes(self.in_features):
            raise ValueError(f"rows of {self.packed.shape[1]} bytes are not {self.in_features} weights in {self.block}")

    @classmethod
    def of(cls, packed: torch.Tensor, block: str) -> Blocks:
        """The weight that rows of blocks stand for; raises ValueError where they are no whole blocks."""
        size, nbytes = GGML[block].block_size, GGML[block].block_bytes
        if packed.dim() != 2 or packed.shape[1] % nbytes:
            raise ValueError(f"blocks of {block} take {nbytes} bytes each, not shape {tuple(packed.shape)}")
        spec = ggml(block)
        return cls(packed, packed[:, :0], None, spec.bits, packed.shape[1] // nbytes * size, "ggml", block=block)

    @property
    def spec(self) -> LayerSpec:
        return ggml(self.block)

    def rows(self, start: int, stop: int) -> Blocks:
        return replace(self, packed=self.packed[start:stop])

    def plain(self) -> Blocks:
        return self

    def to(self, device: torch.device | str) -> Blocks:
        return replace(self, packed=self.packed.to(device))

    def float_scale(self) -> torch.Tensor:
        raise ValueError("the scales of ggml's blocks are inside them")
