"""What each block type can hold: its levels, how scales and minima are stored, and which scales are tried."""

from __future__ import annotations

from dataclasses import dataclass

from qkit.spec.ggml import GGML

from .decode import E2M1_VALUES, IQ4_VALUES

SUPER = 256  # values of a super-block, whose sub-blocks have integers for scales


@dataclass(frozen=True)
class BlockGrid:
    """value = scale * level - minimum, for each sub-block of `sub` values.

    low, high  the least and the greatest level; code = level - low
    levels     those of a codebook, ascending; code = position in it. Empty: the integers low .. high
    affine     there is a minimum: in super-blocks not below zero
    scales     (least, most) of the integers that scales are, times a float16 of the super-block; minima are integers up
               to `most`, times another. None: a float16 of its own
    power      the scale is a power of two, in a byte
    targets    levels that a sub-block's largest weight is tried at (affine: what its range is tried as); none: `high`
    unweighed  these where an error costs the same everywhere, if others
    """

    name: str
    sub: int
    low: int
    high: int
    affine: bool = False
    scales: tuple[int, int] | None = None
    power: bool = False
    levels: tuple[int, ...] = ()
    targets: tuple[float, ...] = ()
    unweighed: tuple[float, ...] = ()

    def tried(self, weighed: bool) -> tuple[float, ...]:
        return self.targets if weighed or not self.unweighed else self.unweighed

    @property
    def per_scale(self) -> int:
        """Sub-blocks that share a float16."""
        return SUPER // self.sub if self.scales else 1


def _around(center: float, reach: float, step: float) -> tuple[float, ...]:
    count = round(reach / step)
    return tuple(round(center + step * k, 6) for k in range(-count, count + 1))


def _either_end(low: int, high: int, reach: float, step: float) -> tuple[float, ...]:
    """The largest weight near one end of the grid or, the scale's sign turned, near the other."""
    return (*_around(low, reach, step), *_around(high, reach, step))


_E2M1 = tuple(sorted(set(E2M1_VALUES)))
GRIDS: dict[str, BlockGrid] = {
    g.name: g
    for g in (
        # Without importances six at the end that has one level more lose what ten at both do.
        BlockGrid(
            "Q4_0", 32, -8, 7, targets=_either_end(-8, 7, 0.8, 0.4), unweighed=(-8.8, -8.44, -8.08, -7.72, -7.36, -7.0)
        ),
        BlockGrid("Q4_1", 32, 0, 15, affine=True, targets=_around(15, 1, 0.2)),
        BlockGrid("Q5_0", 32, -16, 15, targets=_either_end(-16, 15, 0.8, 0.4)),
        BlockGrid("Q5_1", 32, 0, 31, affine=True, targets=_around(31, 1, 0.2)),
        BlockGrid("Q8_0", 32, -127, 127),
        BlockGrid("Q2_K", 16, 0, 3, affine=True, scales=(0, 15), targets=_around(3.5, 1, 0.2)),
        BlockGrid("Q3_K", 16, -4, 3, scales=(-32, 31), targets=_either_end(-4, 3, 0.8, 0.4)),
        BlockGrid("Q4_K", 32, 0, 15, affine=True, scales=(0, 63), targets=_around(15, 1, 0.2)),
        BlockGrid("Q5_K", 32, 0, 31, affine=True, scales=(0, 63), targets=_around(31, 1, 0.2)),
        BlockGrid("Q6_K", 16, -32, 31, scales=(-128, 127), targets=_either_end(-32, 31, 0.8, 0.4)),
        BlockGrid("IQ4_NL", 32, -127, 113, levels=IQ4_VALUES, targets=_either_end(-127, 113, 24, 8)),
        BlockGrid("IQ4_XS", 32, -127, 113, scales=(-32, 31), levels=IQ4_VALUES, targets=_either_end(-127, 113, 24, 8)),
        BlockGrid("MXFP4", 32, -12, 12, power=True, levels=_E2M1),
    )
}
assert all(GGML[name].block_size == (SUPER if g.scales else g.sub) for name, g in GRIDS.items())
