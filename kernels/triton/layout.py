"""The weight layout of the Triton kernels, and the way there from `Weight`: plain torch, on any device.

A block is `words` 32-bit words of one output row. A word holds two neighbouring inputs in its two 16-bit halves, so one
AND turns it into a pair of 16-bit operands, and a block splits into planes of 2 * words neighbouring inputs without any
movement between threads:

    code of input  b * block + j * plane + 2 * r + h   of output n   lies in   words[b, n, r]
    at bit         16 * h + bits * j
                   8 * j + 4 * h         (nf4 and fp4, whose pairs are looked up by the byte)

with plane = 2 * words and block = plane * 16 / bits: 128 inputs at 4 bits, 64 at 8 bits; for nvfp4 planes of 16, which
lie within one group, and blocks of 64. A tile of rows of one block is contiguous in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..weight import TABLES, Weight

N_MULTIPLE = 128  # outputs are padded to it: every BLOCK_N divides it
BY_BYTES = ("nf4", "fp4")


@dataclass(frozen=True)
class Packed:
    """A weight as the Triton kernels take it: value(code) * scale * row.

    words   int32 [blocks, padded_n, words]
    scale   [groups, padded_n], the padding of the inputs included: float16, at most 1; "mxfp4": uint8, the exponent
            over the row's, biased by 127; "nvfp4": uint8, the bits of e4m3. None: one scale a row, held by `row`
    zero    uint8 [groups, padded_n], or None (2**(bits-1))
    row     float32 [padded_n]
    table   int32 [2, 256], the values of a byte's two codes as float16 and as bfloat16 (`pair_table`); None but for
            nf4 and fp4
    """

    words: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    row: torch.Tensor
    table: torch.Tensor | None
    kind: str
    bits: int
    group_size: int
    out_features: int
    in_features: int

    @property
    def plane(self) -> int:
        """Neighbouring inputs that one dot takes."""
        return 2 * self.words.shape[2]

    @property
    def block(self) -> int:
        """Inputs of one block of words."""
        return self.plane * 16 // self.bits

    @property
    def group(self) -> int:
        """Inputs that share one of `scale`; 0 where there is none."""
        return 0 if self.scale is None else self.group_size

    @property
    def device(self) -> torch.device:
        return self.words.device

    def parts(self) -> tuple[Any, ...]:
        """What `Packed` is made of, in its order: as operators take it."""
        return tuple(vars(self).values())


def plane_of(kind: str) -> int:
    return 16 if kind == "nvfp4" else 32


def why_not(kind: str, group_size: int, in_features: int) -> str | None:
    """None where the layout takes such a weight, else why not."""
    plane = plane_of(kind)
    if group_size != in_features and group_size % plane:
        return f"needs groups of a multiple of {plane} or one scale a row, not {group_size} of {in_features} inputs"
    return None


def why_not_quantized(
    kind: str, bits: int, group_size: int, in_features: int, symmetric: bool, activations: str
) -> str | None:
    """None where `w8a8` multiplies such a weight by such activations, quantized as they come; else why not."""
    if (kind, bits, activations) not in (("int", 8, "int8"), ("fp8", 8, "fp8")):
        return f"multiplies 8-bit integers by int8 and fp8 by fp8, not {bits}-bit {kind} by {activations}"
    if group_size != in_features and group_size % 64:
        return f"needs one scale a row or groups that are multiples of 64, not {group_size} of {in_features}"
    if group_size != in_features and not symmetric:
        return f"takes zero points with one scale a row only, not groups of {group_size}"
    return None


def prepack(w: Weight) -> Packed:
    """Raises ValueError for a group size that does not fill planes."""
    reason = why_not(w.kind, w.group_size, w.in_features)
    if reason is not None:
        raise ValueError(f"the Triton layout {reason}")
    scale, row = _scales(w)
    out = row.shape[0]
    rows = -(-out // N_MULTIPLE) * N_MULTIPLE
    words = _words(w.kind, w.bits, w.packed, w.in_features, rows)
    groups = -(-words.shape[0] * plane_of(w.kind) * 16 // w.bits // w.group_size)
    return Packed(
        words=words,
        scale=None if scale is None else _columns(scale, rows, groups),
        zero=None if w.zero is None else _columns(w.zero, rows, groups),
        row=torch.nn.functional.pad(row, (0, rows - out)),
        table=pair_table(w.kind).to(w.device) if w.kind in BY_BYTES else None,
        kind=w.kind,
        bits=w.bits,
        group_size=w.group_size,
        out_features=out,
        in_features=w.in_features,
    )


def codes(p: Packed) -> torch.Tensor:
    """uint8 [out_features, in_features]: the codes back out of the layout."""
    blocks, rows, words = p.words.shape
    out = torch.empty(rows, blocks, 16 // p.bits, words, 2, dtype=torch.uint8, device=p.device)
    for j in range(16 // p.bits):
        for h in range(2):
            bit = _bit(p.kind, p.bits, j, h)
            out[:, :, j, :, h] = ((p.words >> bit) & ((1 << p.bits) - 1)).transpose(0, 1)
    return out.view(rows, -1)[: p.out_features, : p.in_features]


def restore_scale(p: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The scales [out, groups] as they were stored, if `dtype` was their type; compare them to be sure."""
    groups = p.in_features // p.group_size
    if p.scale is None:
        return p.row[: p.out_features, None].to(dtype)
    scale = p.scale[:groups, : p.out_features].t().contiguous()
    if p.kind == "nvfp4":
        return scale.view(dtype)
    row = p.row[: p.out_features, None]
    if p.kind == "mxfp4":
        return (scale.int() + torch.frexp(row).exponent - 1).to(dtype)
    return (scale.float() * row).to(dtype)


def pair_table(kind: str) -> torch.Tensor:
    """int32 [2, 256]: for each byte the values of its low and its high code, as float16 and as bfloat16 halves."""
    values = torch.tensor(TABLES[kind])
    byte = torch.arange(256)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], -1)
    return torch.stack([pairs.to(t).view(torch.int32).view(256) for t in (torch.float16, torch.bfloat16)])


def _bit(kind: str, bits: int, j: int, h: int) -> int:
    return 8 * j + 4 * h if kind in BY_BYTES else 16 * h + bits * j


def _words(kind: str, bits: int, packed: torch.Tensor, in_features: int, rows: int) -> torch.Tensor:
    """int32 [out, in * bits / 32] in reading order -> int32 [blocks, rows, words]."""
    plane, per_word, planes = plane_of(kind), 32 // bits, 16 // bits
    blocks = -(-in_features // (plane * planes))
    fill = blocks * planes * plane // per_word - packed.shape[1]
    if fill:
        packed = torch.nn.functional.pad(packed, (0, fill))
    out = packed.shape[0]
    source = packed.view(out, blocks, planes, -1).transpose(0, 1)
    words = packed.new_zeros(blocks, rows, plane // 2)
    target = words[:, :out].view(blocks, out, -1, per_word // 2)
    for j in range(planes):
        for i in range(per_word):  # one code of each word at a time, in place: weights are large
            part = source[:, :, j] >> (i * bits)
            part &= (1 << bits) - 1
            part <<= _bit(kind, bits, j, i % 2)
            target[..., i // 2] |= part
    return words


def nan_rows(w: Weight) -> torch.Tensor:
    """bool [out]: outputs with a weight or a scale that is e4m3's NaN, which kernels, moving its bits, take for 480."""
    stored = {"fp8": w.packed, "nvfp4": w.scale}.get(w.kind)
    if stored is None:
        return torch.zeros(w.out_features, dtype=torch.bool, device=w.device)
    return ((stored.contiguous().view(torch.uint8) & 0x7F) == 0x7F).any(1)


def _scales(w: Weight) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Scales [out, groups] for the kernel or None, and row [out]; NaN there makes the output NaN, as it must."""
    multiplier = torch.full((w.out_features,), w.multiplier, device=w.device)
    multiplier = torch.where(nan_rows(w), float("nan"), multiplier)
    if w.kind == "nvfp4":
        return w.scale.view(torch.uint8), multiplier
    if w.kind == "mxfp4":
        largest = w.scale.amax(1, keepdim=True)
        row = torch.ldexp(multiplier, largest[:, 0].int() - 127)
        row = torch.where(largest[:, 0] == 255, float("nan"), row)  # e8m0's NaN
        return (w.scale.int() - largest.int() + 127).clamp_(min=0).to(torch.uint8), row
    scale = w.scale.float() * multiplier.unsqueeze(1)
    if scale.shape[1] == 1:
        return None, scale[:, 0]
    # A power of two per row brings every scale into float16's normal range, whatever type it was stored in.
    exponent = torch.frexp(scale.abs().amax(1)).exponent
    return torch.ldexp(scale, -exponent.unsqueeze(1)).half(), torch.ldexp(torch.ones_like(multiplier), exponent)


def _columns(t: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """[out, groups] -> contiguous [groups, rows], zero padded: the inputs that fill the last block have groups too."""
    return torch.nn.functional.pad(t, (0, groups - t.shape[1], 0, rows - t.shape[0])).t().contiguous()
