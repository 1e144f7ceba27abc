"""How much of the memory's bandwidth a sweep's decode steps reach."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import QkitError
from ...estimate.answer import work_of
from ...estimate.intensity import decode_work
from ...estimate.loaded import as_loaded
from ...estimate.subject import of_described

if TYPE_CHECKING:
    from ...sources.types import Source
    from .types import Point, Sweep

FORMULAS = {
    "sweep read GB/s": "bytes that a step reads, by formula, / TPOT p50: weights as the engine holds them (of experts "
    "those that the batch is expected to hit) and each sequence's cache at the middle of the new tokens",
    "sweep of ceiling": "read GB/s / the read ceiling of the device",
}


def with_bandwidth(sweep: Sweep, source: Source, device_kind: str, ceiling_gbs: float) -> Sweep:
    """The sweep with `read_gbs` and `read_share` at each point of which a step was measured; as it is where the model's
    bytes are not known.

    source       the model
    device_kind  "cpu" or "gpu"
    ceiling_gbs  1e9 bytes a second that the device reads at most
    """
    try:
        held = as_loaded(of_described(source), sweep.engine, device_kind)
    except QkitError:
        return sweep
    work = work_of(held, sweep.engine, held.dtype)

    def reached(point: Point) -> Point:
        if point.tpot_p50 is None:
            return point
        _, nbytes = decode_work(work, point.batch, point.prompt + point.generated / 2)
        read = nbytes / point.tpot_p50 / 1e9
        return replace(point, read_gbs=read, read_share=read / ceiling_gbs)

    return replace(sweep, points=tuple(map(reached, sweep.points)))
