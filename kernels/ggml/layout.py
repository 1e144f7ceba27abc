"""`Fields` -> the bytes of blocks: the inverse of decode.py, type by type (block_q4_0 ... in ggml-common.h)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .decode import E2M1_VALUES
from .grids import GRIDS
from .reference import Fields

# Each takes what a block holds, a block a row: codes uint8 [blocks, block_size], d and dmin as bytes [blocks, 2],
# scales and minima int16 [blocks, sub-blocks]; it returns the pieces of the block in order.
Pieces = list[torch.Tensor]


def _nibbles(codes: torch.Tensor, run: int) -> torch.Tensor:
    """4-bit codes, of which the first `run` are low nibbles, the next high ones, and so on: [blocks, size / 2]."""
    pairs = codes.unflatten(1, (-1, 2, run))
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)


def _fields(codes: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """Fields of `bits` bits: of a byte's 8 / bits, one from each of as many runs."""
    runs = codes.unflatten(1, (-1, 8 // bits, run))
    out = runs[:, :, 0].clone()
    for k in range(1, 8 // bits):
        out |= runs[:, :, k] << (bits * k)
    return out.flatten(1)


def _fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """Bit 4 of each of 32 codes as a mask of 32 bits: uint8 [blocks, 4]."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return ((codes >> 4).view(len(codes), 4, 8) * weights).sum(2, dtype=torch.uint8)


def _scale_min(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Eight 6-bit scales and minima in 12 bytes: see decode._scale_min."""
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    return torch.cat(
        [
            (s[:, :4] & 63) | (s[:, 4:] >> 4) << 6,
            (m[:, :4] & 63) | (m[:, 4:] >> 4) << 6,
            (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        1,
    )


Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Pieces]


def _q3_k_scales(scales: torch.Tensor) -> Pieces:
    s = (scales + 32).to(torch.uint8)
    return [_fields(s & 15, 8, 4), _fields(s >> 4, 4, 2)]


def _iq4_xs_scales(scales: torch.Tensor) -> Pieces:
    s = (scales + 32).to(torch.uint8)
    return [_fields(s >> 4, 1, 2), _fields(s & 15, 1, 4)]


def _mxfp4(c: torch.Tensor, d: torch.Tensor) -> Pieces:
    order = sorted(set(E2M1_VALUES))
    table = torch.tensor([E2M1_VALUES.index(v) for v in order], dtype=torch.uint8)
    return [d[:, :1], _nibbles(table[c.int()], 16)]


_BLOCKS: dict[str, Block] = {
    "Q4_0": lambda c, d, dmin, s, m: [d, _nibbles(c, 16)],
    "Q4_1": lambda c, d, dmin, s, m: [d, dmin, _nibbles(c, 16)],
    "Q5_0": lambda c, d, dmin, s, m: [d, _fifth_bits(c), _nibbles(c & 15, 16)],
    "Q5_1": lambda c, d, dmin, s, m: [d, dmin, _fifth_bits(c), _nibbles(c & 15, 16)],
    "Q8_0": lambda c, d, dmin, s, m: [d, c - 127],
    "IQ4_NL": lambda c, d, dmin, s, m: [d, _nibbles(c, 16)],
    "MXFP4": lambda c, d, dmin, s, m: _mxfp4(c, d),
    "Q2_K": lambda c, d, dmin, s, m: [(s | m << 4).to(torch.uint8), _fields(c, 32, 2), d, dmin],
    "Q3_K": lambda c, d, dmin, s, m: [_fields(c >> 2, 32, 1), _fields(c & 3, 32, 2), *_q3_k_scales(s), d],
    "Q4_K": lambda c, d, dmin, s, m: [d, dmin, _scale_min(s, m), _nibbles(c, 32)],
    "Q5_K": lambda c, d, dmin, s, m: [d, dmin, _scale_min(s, m), _fields(c >> 4, 32, 1), _nibbles(c & 15, 32)],
    "Q6_K": lambda c, d, dmin, s, m: [
        _nibbles(c & 15, 64), _fields(c >> 4, 32, 2), s.to(torch.int8).view(torch.uint8), d,
    ],
    "IQ4_XS": lambda c, d, dmin, s, m: [d, *_iq4_xs_scales(s), _nibbles(c, 16)],
}  # fmt: skip


def assemble(name: str, fields: Fields) -> torch.Tensor:
    """uint8 [rows, bytes of a row]."""
    grid = GRIDS[name]
    rows = fields.codes.shape[0]
    size = grid.sub * grid.per_scale
    nothing = torch.empty(0)

    def halves(x: torch.Tensor | None) -> torch.Tensor:
        return nothing if x is None else x.contiguous().view(torch.uint8).view(-1, 2)

    def integers(x: torch.Tensor | None) -> torch.Tensor:
        return nothing if x is None else x.view(-1, grid.per_scale)

    pieces = _BLOCKS[name](
        fields.codes.view(-1, size),
        halves(fields.d),
        halves(fields.dmin),
        integers(fields.scales),
        integers(fields.minima),
    )
    return torch.cat(pieces, 1).view(rows, -1)
