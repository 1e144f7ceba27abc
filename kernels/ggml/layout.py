"""`Fields` -> the bytes of blocks: the inverse of decode.py (block_q4_0 ... in ggml-common.h). `LAYOUTS` says what a
block consists of, to `assemble` here and to the C++."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .decode import E2M1_VALUES
from .grids import GRIDS
from .reference import Fields

# What a piece is made of: QkPart of qkit_cpu.h.
D, DMIN, CODES, SCALES, SCALE_MIN = range(5)


@dataclass(frozen=True)
class Piece:
    """Some bytes of a block.

    part              D, DMIN: a float16 (D of a power of two: a byte); CODES; SCALES: the integers that scales are,
                      then those of the minima; SCALE_MIN: these in 6 bits each, see `_scale_min`
    add, shift, bits  of CODES and SCALES: (byte + add) >> shift, of which `bits` bits are kept
    run               a byte holds 8 / bits of them, one from each of as many runs: nibbles of run 16 are the first 16
                      as low nibbles of 16 bytes, the next 16 as high ones, and so on
    """

    part: int
    add: int = 0
    shift: int = 0
    bits: int = 8
    run: int = 1


def _codes(bits: int, run: int, shift: int = 0) -> Piece:
    return Piece(CODES, 0, shift, bits, run)


_HALF, _MINIMUM, _SIX_BITS = Piece(D), Piece(DMIN), Piece(SCALE_MIN)
_NIBBLES, _FIFTH_BITS = _codes(4, 16), _codes(1, 1, 4)
LAYOUTS: dict[str, tuple[Piece, ...]] = {
    "Q4_0": (_HALF, _NIBBLES),
    "Q4_1": (_HALF, _MINIMUM, _NIBBLES),
    "Q5_0": (_HALF, _FIFTH_BITS, _NIBBLES),
    "Q5_1": (_HALF, _MINIMUM, _FIFTH_BITS, _NIBBLES),
    "Q8_0": (_HALF, Piece(CODES, add=-127)),
    "IQ4_NL": (_HALF, _NIBBLES),
    "MXFP4": (_HALF, _NIBBLES),
    "Q2_K": (Piece(SCALES, bits=4, run=16), _codes(2, 32), _HALF, _MINIMUM),
    "Q3_K": (
        _codes(1, 32, 2), _codes(2, 32), Piece(SCALES, 32, 0, 4, 8), Piece(SCALES, 32, 4, 2, 4), _HALF,
    ),
    "Q4_K": (_HALF, _MINIMUM, _SIX_BITS, _codes(4, 32)),
    "Q5_K": (_HALF, _MINIMUM, _SIX_BITS, _codes(1, 32, 4), _codes(4, 32)),
    "Q6_K": (_codes(4, 64), _codes(2, 32, 4), Piece(SCALES), _HALF),
    "IQ4_XS": (_HALF, Piece(SCALES, 32, 4, 2, 1), Piece(SCALES, 32, 0, 4, 1), _NIBBLES),
}  # fmt: skip
# Codes that are stored as others than their positions in `levels`.
STORED: dict[str, tuple[int, ...]] = {"MXFP4": tuple(E2M1_VALUES.index(v) for v in GRIDS["MXFP4"].levels)}
assert LAYOUTS.keys() == GRIDS.keys()


def assemble(name: str, fields: Fields) -> torch.Tensor:
    """uint8 [rows, bytes of a row]."""
    grid = GRIDS[name]
    codes = fields.codes.view(-1, grid.sub * grid.per_scale)
    if name in STORED:
        codes = torch.tensor(STORED[name], dtype=torch.uint8)[codes.int()]
    scales = [s.to(torch.uint8).view(-1, grid.per_scale) for s in (fields.scales, fields.minima) if s is not None]
    pieces = []
    for piece in LAYOUTS[name]:
        if piece.part in (D, DMIN):
            half = fields.d if piece.part == D else fields.dmin
            assert half is not None
            raw = half.contiguous().view(torch.uint8).view(-1, 2)
            pieces.append(raw[:, :1] if grid.power else raw)
        elif piece.part == SCALE_MIN:
            pieces.append(_scale_min(*scales))
        else:
            pieces.append(_fields(codes if piece.part == CODES else torch.cat(scales, 1), piece))
    return torch.cat(pieces, 1).view(fields.codes.shape[0], -1)


def _fields(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """uint8 [blocks, n] -> [blocks, n * bits / 8]."""
    per = 8 // piece.bits
    runs = ((x + piece.add % 256) >> piece.shift & (1 << piece.bits) - 1).unflatten(1, (-1, per, piece.run))
    out = runs[:, :, 0].clone()
    for k in range(1, per):
        out |= runs[:, :, k] << (piece.bits * k)
    return out.flatten(1)


def _scale_min(s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Eight 6-bit scales and minima in 12 bytes: see decode._scale_min."""
    return torch.cat(
        [
            (s[:, :4] & 63) | (s[:, 4:] >> 4) << 6,
            (m[:, :4] & 63) | (m[:, 4:] >> 4) << 6,
            (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        1,
    )
