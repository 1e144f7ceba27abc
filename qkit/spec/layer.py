"""How one matrix is stored: `Grid`, `Scale`, `Activations`, and `LayerSpec`, which is all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import QkitError
from .ggml import GGML

CHANNEL = 0  # group size of a spec with one scale per output channel
GRIDS = ("int", "float", "nf4", "fp4", "ggml")
_BITS = {"int": (2, 3, 4, 8), "float": (4, 8), "nf4": (4,), "fp4": (4,)}
_DTYPES = {"int": ("BF16", "F16", "F32"), "float": ("BF16", "F16", "F32", "F8_E8M0", "F8_E4M3", "U8")}


@dataclass(frozen=True)
class Grid:
    """What a code stands for; the words are compressed-tensors' (quant_args.py).

    kind       "int": code - zero; "float": a small float of 4 (e2m1) or 8 (e4m3) bits; "nf4", "fp4": bitsandbytes'
               tables; "ggml": a block type of llama.cpp's
    bits       integers 2, 3, 4 or 8, others 4 or 8; integer codes are unsigned, 0 .. 2**bits - 1
    symmetric  zero is 2**(bits-1) everywhere and is not stored
    low        the least code minus that zero where a format has a narrow range (-127), else None
    min_zero   least zero point the format can hold (GPTQ v1 stores zero - 1, so 0 has no form there)
    block      of "ggml": the block type, "Q4_K"; or a mix of them, "q4_k_m", until the format has chosen for a tensor.
               Of "int": "llm.int8", whose codes are bitsandbytes' to the bit
    """

    kind: str = "int"
    bits: int = 4
    symmetric: bool = True
    low: int | None = None
    min_zero: int = 0
    block: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GRIDS:
            raise QkitError(f"unknown grid {self.kind!r}", "known: " + ", ".join(GRIDS))
        if self.bits not in _BITS.get(self.kind, range(1, 17)):
            name = "integer" if self.kind == "int" else self.kind
            hint = "use 4 or 8 bits; GPTQ has 2 and 3 too"
            raise QkitError(f"{self.bits}-bit {name} weights are not supported", hint)
        if self.min_zero not in (0, 1):
            raise QkitError(f"min_zero must be 0 or 1, not {self.min_zero}")


@dataclass(frozen=True)
class Scale:
    """Where scales stand and how they are stored.

    block  (outputs, inputs) that share one; 0: all of them. (1, 128): a group; (1, 0): an output channel; (0, 0): the
           tensor; (128, 128): an FP8 block
    dtype  safetensors name; quantizers round to it *before* they choose codes
    over   how the scales are themselves scaled: NVFP4's global scale, bitsandbytes' double quantization, k-quants
    """

    block: tuple[int, int] = (1, 128)
    dtype: str = "BF16"
    over: Scale | None = None

    def shape(self, matrix: tuple[int, int]) -> tuple[int, int]:
        """[row blocks, column blocks] of the scales of an [out, in] matrix."""
        rows, columns = (1 if not b else -(-n // b) for n, b in zip(matrix, self.block, strict=True))
        return rows, columns


@dataclass(frozen=True)
class Activations:
    """How a layer's input is quantized before the product. kind "int" or "float" of `bits`; dynamic: scales are taken
    from the input as it comes, one per "token" or one per "tensor"; else they are stored."""

    kind: str = "int"
    bits: int = 8
    dynamic: bool = True
    per: str = "token"


@dataclass(frozen=True)
class LayerSpec:
    """How an [out, in] weight is stored, and how its input is quantized (None: not). w ~ (code - zero) * scale."""

    grid: Grid = Grid()
    scale: Scale = Scale()
    input: Activations | None = None

    def __post_init__(self) -> None:
        known = _DTYPES.get(self.grid.kind)
        if known and self.scale.dtype not in known:
            raise QkitError(f"scale dtype {self.scale.dtype!r} is not supported", "use " + ", ".join(known))
        if self.grid.kind == "int" and self.scale.block[0] == 1:
            size = self.scale.block[1]
            if size != CHANNEL and (size < 16 or size % 8):
                raise QkitError(
                    f"group size {size} is not usable",
                    "use a multiple of 8, at least 16 (128, 64 and 32 are usual), or 'channel'",
                )

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def symmetric(self) -> bool:
        return self.grid.symmetric

    @property
    def group_size(self) -> int:
        """Input channels that share a scale; CHANNEL (0): all of a row."""
        return self.scale.block[1]

    @property
    def scale_dtype(self) -> str:
        return self.scale.dtype

    @property
    def min_zero(self) -> int:
        return self.grid.min_zero

    @property
    def kind(self) -> str:
        """What the kernels call it: int, nf4, fp4, fp8, mxfp4, nvfp4; and ggml, llm.int8."""
        if self.grid.block == "llm.int8":
            return self.grid.block
        if self.grid.kind != "float":
            return self.grid.kind
        named = {"F8_E8M0": "mxfp4", "U8": "mxfp4", "F8_E4M3": "nvfp4"}
        return "fp8" if self.bits == 8 else named.get(self.scale.dtype, "e2m1")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def mid(self) -> int:
        """The zero point of a symmetric integer grid."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Number of groups along the input; raises ValueError where the group size does not divide it."""
        if self.group_size == CHANNEL:
            return 1
        if in_features % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide {in_features}")
        return in_features // self.group_size

    def describe(self) -> str:
        """ "int4 symmetric g128", "nf4 g64", "fp8 128x128"."""
        if self.kind == "ggml":
            return self.grid.block
        rows, columns = self.scale.block
        where = (
            "tensor" if not rows else "channel" if not columns else f"g{columns}" if rows == 1 else f"{rows}x{columns}"
        )
        name = f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'}" if self.kind == "int" else self.kind
        if self.scale.over is not None and self.kind in ("nf4", "fp4"):
            where += " dq"
        inputs = f", {self.input.kind}{self.input.bits} activations" if self.input else ""
        return f"{name} {where}{inputs}"

    def with_group_size(self, group_size: int) -> LayerSpec:
        return replace(self, scale=replace(self.scale, block=(self.scale.block[0], group_size)))

    def stored_with(self, scale_dtype: str, min_zero: int | None = None) -> LayerSpec:
        """The same grid with the scale's type, and the least zero point, that a format dictates."""
        grid = self.grid if min_zero is None else replace(self.grid, min_zero=min_zero)
        return replace(self, grid=grid, scale=replace(self.scale, dtype=scale_dtype))


def integer(
    bits: int = 4, group_size: int = 128, symmetric: bool = True, scale_dtype: str = "BF16", min_zero: int = 0
) -> LayerSpec:
    """Integers with a scale per group of inputs, or per output channel (group_size CHANNEL)."""
    return LayerSpec(Grid("int", bits, symmetric, min_zero=min_zero), Scale((1, group_size), scale_dtype))


def table(kind: str, block: int = 64, scale_dtype: str = "F32", over: Scale | None = None) -> LayerSpec:
    """bitsandbytes' 4-bit tables, "nf4" or "fp4", with an absolute maximum per block of inputs."""
    return LayerSpec(Grid(kind, 4), Scale((1, block), scale_dtype, over))


def llm_int8() -> LayerSpec:
    """bitsandbytes' LLM.int8(): symmetric codes of 8 bits, -127 .. 127, a scale per output channel."""
    return LayerSpec(Grid("int", 8, low=-127, block="llm.int8"), Scale((1, CHANNEL), "F32"))


def fp8(block: tuple[int, int] = (1, 0), scale_dtype: str = "BF16") -> LayerSpec:
    """e4m3 weights with a scale per output channel, tensor or block."""
    return LayerSpec(Grid("float", 8), Scale(block, scale_dtype))


def ggml(block: str) -> LayerSpec:
    """A block type of llama.cpp's, "Q4_K", or a mix of them, "q4_k_m"."""
    digits = "".join(c for c in block.replace("BF", "F").replace("bf", "f") if c.isdigit())
    kind = GGML.get(block)
    size = kind.block_size if kind else 0
    return LayerSpec(Grid("ggml", 16 if digits[:2] == "16" else int(digits[0]), block=block), Scale((1, size), "F16"))


def nvfp4() -> LayerSpec:
    """e2m1 with e4m3 scales per 16 inputs and one over all of them."""
    return LayerSpec(Grid("float", 4), Scale((1, 16), "F8_E4M3", over=Scale((0, 0), "F32")))


def mxfp4() -> LayerSpec:
    """e2m1 with a power of two per 32 inputs."""
    return LayerSpec(Grid("float", 4), Scale((1, 32), "F8_E8M0"))


def w8a8() -> LayerSpec:
    """Integers -127 .. 127 with a scale per output channel, and inputs rounded to 8 bits per token."""
    return LayerSpec(Grid("int", 8, low=-127), Scale((1, CHANNEL)), Activations("int", 8))
