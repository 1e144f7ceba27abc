"""The CRC-32 of a whole from those of its parts."""

from __future__ import annotations

import functools

_POLYNOMIAL = 0xEDB88320  # of zlib's crc32, bits reversed


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two runs of bytes in a row, from the CRC-32 of each; length: bytes of the second.

    What the first contributes is its CRC followed by `length` zero bytes: a product of matrices over GF(2), one for
    each power of two in the length (Mark Adler's method, zlib's crc32_combine)."""
    power = 0
    while length >> power:
        if length >> power & 1:
            first = _times(_zero_bytes(power), first)
        power += 1
    return first ^ second


@functools.cache
def _zero_bytes(power: int) -> tuple[int, ...]:
    """What 2**power zero bytes make of a CRC."""
    if power:
        before = _zero_bytes(power - 1)
        return tuple(_times(before, row) for row in before)
    matrix: tuple[int, ...] = (_POLYNOMIAL, *(1 << k for k in range(31)))  # one zero bit
    for _ in range(3):
        matrix = tuple(_times(matrix, row) for row in matrix)
    return matrix


def _times(matrix: tuple[int, ...], vector: int) -> int:
    found = 0
    for row in matrix:
        if vector & 1:
            found ^= row
        vector >>= 1
    return found
