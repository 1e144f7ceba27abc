"""Blocks of the ggml quantization types, decoded: bytes to float32, vectorized.

Layouts: `block_q4_0` ... in ggml-common.h of ggml; arithmetic: `dequantize_row_*` in ggml-quants.c, in the same
order in float32, so that results are equal bit for bit. Every decoder takes raw uint8 [blocks, block_bytes] and
writes out float32 [blocks, block_size], contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Decoder = Callable[[torch.Tensor, torch.Tensor], None]

# Non-uniform 4-bit grid of the IQ4 types: `kvalues_iq4nl` in ggml-common.h.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1 (OCP Microscaling Formats v1.0, section 5.3.3), doubled so that they are whole; the scale is halved.
E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def half(raw: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block, as float32 [blocks, 1]."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def nibbles(qs: torch.Tensor, run: int) -> torch.Tensor:
    """4-bit codes of uint8 [blocks, k*run]: for each run of bytes its low nibbles, then its high ones;
    uint8 [blocks, k, 2, run]."""
    runs = qs.unflatten(1, (-1, run))
    out = torch.empty(len(qs), runs.shape[1], 2, run, dtype=torch.uint8)
    torch.bitwise_and(runs, 15, out=out[:, :, 0])
    torch.bitwise_right_shift(runs, 4, out=out[:, :, 1])
    return out


def fields(x: torch.Tensor, run: int, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
    """Bit fields of uint8 [blocks, k*run]: for each run of bytes, the field at each shift in turn;
    uint8 [blocks, k, len(shifts), run]."""
    runs = x.unflatten(1, (-1, run)).unsqueeze(2)
    return (runs >> torch.tensor(shifts, dtype=torch.uint8)[:, None]).bitwise_and_(mask)


def fifth_bits(qh: torch.Tensor) -> torch.Tensor:
    """Bit j of the 32-bit mask uint8 [blocks, 4] as 0 or 16 at position j: uint8 [blocks, 32]."""
    # One table look-up turns a byte of the mask into eight bytes.
    bits = (torch.arange(256, dtype=torch.int16)[:, None] >> torch.arange(8, dtype=torch.int16)) & 1
    table = bits.to(torch.uint8).mul_(16).view(torch.int64).view(-1)
    return table[qh.long()].view(torch.uint8)


def look_up(values: tuple[int, ...], codes: torch.Tensor, out: torch.Tensor) -> None:
    """out float32 [blocks, n] = values[codes]; codes uint8 with as many elements."""
    table = torch.tensor(values, dtype=torch.float32)
    torch.index_select(table, 0, codes.reshape(-1).int(), out=out.view(-1))


def _q4_0(raw: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(nibbles(raw[:, 2:], 16).view(-1, 32)).sub_(8).mul_(half(raw, 0))


def _q4_1(raw: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(nibbles(raw[:, 4:], 16).view(-1, 32)).mul_(half(raw, 0)).add_(half(raw, 2))


def _q5_0(raw: torch.Tensor, out: torch.Tensor) -> None:
    codes = nibbles(raw[:, 6:], 16).view(-1, 32).bitwise_or_(fifth_bits(raw[:, 2:6]))
    out.copy_(codes).sub_(16).mul_(half(raw, 0))


def _q5_1(raw: torch.Tensor, out: torch.Tensor) -> None:
    codes = nibbles(raw[:, 8:], 16).view(-1, 32).bitwise_or_(fifth_bits(raw[:, 4:8]))
    out.copy_(codes).mul_(half(raw, 0)).add_(half(raw, 2))


def _q8_0(raw: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(raw[:, 2:].view(torch.int8)).mul_(half(raw, 0))


def _iq4_nl(raw: torch.Tensor, out: torch.Tensor) -> None:
    look_up(IQ4_VALUES, nibbles(raw[:, 2:], 16), out)
    out.mul_(half(raw, 0))


def _mxfp4(raw: torch.Tensor, out: torch.Tensor) -> None:
    look_up(E2M1_VALUES, nibbles(raw[:, 1:], 16), out)
    # E8M0: 2**(e - 127), halved. Built from the bits: 2**-128 and 2**-127 are subnormal in float32.
    exponent = raw[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    out.mul_(bits.view(torch.float32))


def _tq1_0(raw: torch.Tensor, out: torch.Tensor) -> None:
    # Base 3, four or five digits to a byte: (byte * 3**k mod 256) * 3 / 256 is digit k.
    powers = torch.tensor((1, 3, 9, 27, 81), dtype=torch.uint8)[:, None]
    at = 0
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        part = raw[:, None, start:stop] * powers[:digits]
        size = (stop - start) * digits
        out[:, at : at + size].copy_(((part.short() * 3) >> 8).flatten(1))
        at += size
    out.sub_(1).mul_(half(raw, 52))


def _tq2_0(raw: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(fields(raw[:, :64], 32, (0, 2, 4, 6), 3).view(-1, 256)).sub_(1).mul_(half(raw, 64))


# Super-blocks of 256 values with scales of their own for sub-blocks of 16 or 32.


def _scale_min(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 6-bit scales and mins of Q4_K and Q5_K, `get_scale_min_k4`: uint8 [blocks, 12] -> two uint8 [blocks, 8].

    The first four of each are whole in bytes 0-3 and 4-7; of the last four, bytes 8-11 hold the low nibbles and
    the top two bits of bytes 0-7 the rest.
    """
    scale, minimum, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        torch.cat([scale & 0x3F, (low & 0x0F) | ((scale >> 2) & 0x30)], 1),
        torch.cat([minimum & 0x3F, (low >> 4) | ((minimum >> 2) & 0x30)], 1),
    )


def _affine(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, out: torch.Tensor) -> None:
    """out = codes * scale - minimum per sub-block; scale and minimum float32 [blocks, sub-blocks]."""
    view = out.view(len(out), scale.shape[1], -1)
    view.copy_(codes.view(view.shape)).mul_(scale.unsqueeze(2)).sub_(minimum.unsqueeze(2))


def _scaled(codes: torch.Tensor, offset: int, scale: torch.Tensor, out: torch.Tensor) -> None:
    """out = (codes - offset) * scale per sub-block; scale float32 [blocks, sub-blocks]."""
    view = out.view(len(out), scale.shape[1], -1)
    view.copy_(codes.view(view.shape)).sub_(offset).mul_(scale.unsqueeze(2))


def _q2_k(raw: torch.Tensor, out: torch.Tensor) -> None:
    scales = raw[:, :16]
    codes = fields(raw[:, 16:80], 32, (0, 2, 4, 6), 3)
    _affine(codes, half(raw, 80) * (scales & 15), half(raw, 82) * (scales >> 4), out)


def _q3_k(raw: torch.Tensor, out: torch.Tensor) -> None:
    high = fields(raw[:, :32], 32, tuple(range(8)), 1)
    codes = fields(raw[:, 32:96], 32, (0, 2, 4, 6), 3)
    codes |= high.view(codes.shape) << 2
    # 6-bit scales: low nibbles in 8 bytes, the upper two bits in 4 more.
    low = fields(raw[:, 96:104], 8, (0, 4), 15).view(-1, 16)
    scales = low | (fields(raw[:, 104:108], 4, (0, 2, 4, 6), 3).view(-1, 16) << 4)
    _scaled(codes, 4, half(raw, 108) * (scales.float() - 32), out)


def _q4_k(raw: torch.Tensor, out: torch.Tensor) -> None:
    scales, minima = _scale_min(raw[:, 4:16])
    _affine(nibbles(raw[:, 16:], 32), half(raw, 0) * scales, half(raw, 2) * minima, out)


def _q5_k(raw: torch.Tensor, out: torch.Tensor) -> None:
    scales, minima = _scale_min(raw[:, 4:16])
    codes = nibbles(raw[:, 48:], 32)
    codes |= fields(raw[:, 16:48], 32, tuple(range(8)), 1).view(codes.shape) << 4
    _affine(codes, half(raw, 0) * scales, half(raw, 2) * minima, out)


def _q6_k(raw: torch.Tensor, out: torch.Tensor) -> None:
    codes = nibbles(raw[:, :128], 64).view(-1, 2, 4, 32)
    codes |= fields(raw[:, 128:192], 32, (0, 2, 4, 6), 3) << 4
    _scaled(codes, 32, half(raw, 208) * raw[:, 192:208].view(torch.int8), out)


def _iq4_xs(raw: torch.Tensor, out: torch.Tensor) -> None:
    # 6-bit scales: two low nibbles to a byte, four upper pairs to a byte.
    low = fields(raw[:, 4:8], 1, (0, 4), 15).view(-1, 8)
    high = fields(raw[:, 2:4], 1, (0, 2, 4, 6), 3).view(-1, 8)
    scales = half(raw, 0) * ((low | (high << 4)).float() - 32)
    look_up(IQ4_VALUES, nibbles(raw[:, 8:], 16), out)
    out.view(-1, 8, 32).mul_(scales.unsqueeze(2))


DECODERS: dict[str, Decoder] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "MXFP4": _mxfp4,
}  # fmt: skip
