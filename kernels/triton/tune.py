"""Measuring launch configurations on the device at hand, only when asked to."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import torch
import triton

from . import config, ops
from .config import Config, Key
from .device import card
from .layout import Packed

# Bytes written between runs, so that weights come from memory and not from a cache: more than any card's L2.
FLUSH_BYTES = 256 << 20


def candidates(key: Key, rows: int, processors: int, amd: bool = False) -> list[Config]:
    """Configurations worth measuring for a bucket of rows: the rule's first, some twenty at most."""
    found = [config.rule(key, rows, processors, amd)]
    blocks = -(-key.in_features // (512 // key.bits))
    tokens = max(16 if amd else 8, rows)

    def parts(tiles: int) -> list[int]:
        """Ways to split K that fill the device one to four times over and leave each part two blocks or more."""
        ways = [s for s in (1, 2, 4, 8, 16) if blocks // s >= 2 or s == 1]
        return sorted(ways, key=lambda s: abs(tiles * s - 2 * processors))[:2]

    if rows <= 64:
        for bn, warps, stages in ((64, 4, 4), (64, 4, 6), (128, 4, 3), (128, 4, 4), (128, 8, 4)):
            found += [Config("gemm", tokens, bn, warps, stages, s) for s in parts(key.padded_n // bn)]
    else:
        for bm, bn, warps, stages in ((64, 128, 4, 4), (64, 128, 8, 4), (128, 128, 8, 3), (128, 128, 8, 4)):
            if rows <= 1024:
                tiles = key.padded_n // bn * -(-rows // bm)
                found += [Config("gemm", bm, bn, warps, stages, s) for s in ((1, 2) if tiles < processors else (1,))]
        found.append(Config("dequantize", 0, 0, 0, 0, 1))
    if amd:  # its pipeliner holds stages in registers
        found = [c._replace(stages=min(c.stages, 2)) for c in found]
    return list(dict.fromkeys(found))


def tune(
    packed: Packed,
    dtype: torch.dtype,
    rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    folder: pathlib.Path | None = None,
) -> dict[int, tuple[Config, float]]:
    """Measures the candidates for each bucket of `rows` and writes the best to the device's cache file.

    Returns bucket -> (configuration, median seconds). Other entries of the file stay. Call it outside graph capture;
    products after it use what was found (where `folder` is the default one).
    Raises ValueError for a weight that is not on a CUDA or ROCm device.
    """
    if packed.device.type != "cuda":
        raise ValueError(f"tuning needs a weight on a CUDA or ROCm device, not on {packed.device}")
    on, key = card(packed.device), Key.of(packed, dtype)
    best: dict[int, tuple[Config, float]] = {}
    for m in sorted({config.bucket(r) for r in rows}):
        x = torch.randn(m, packed.in_features, dtype=dtype, device=packed.device)
        timed = [(measure(c, x, packed), c) for c in candidates(key, m, on.processors, on.amd)]
        seconds, chosen = min((t, c) for t, c in timed if t is not None)
        best[m] = (chosen, seconds)
    path = config.path_of(on.name, folder)
    kept = {k: {str(b): c for b, c in v.items()} for k, v in config.load(path).items()}
    kept[key.text()] = {**kept.get(key.text(), {}), **{str(m): c for m, (c, _) in best.items()}}
    config.save(path, on.name, kept)
    config.forget()
    return best


def measure(c: Config, x: torch.Tensor, p: Packed, repeats: int = 20) -> float | None:
    """Median seconds of one product with cold caches, or None where the configuration does not fit the device."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=x.device)
    times = []
    for i in range(repeats + 2):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        try:
            ops.run(c, x, p)
        except triton.runtime.errors.OutOfResources:
            return None
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]
