"""Launch configurations: which tile for how many rows. Tuned ones from a cache, else a rule.

The cache is JSON under `profiles/triton/`, one file a device:

    {"device": "NVIDIA H100 80GB HBM3", "triton": "3.9.0",
     "configs": {"int4 g128 z float16 4096x4096": {"1": ["gemm", 8, 64, 4, 6, 8], "16": ["gemm", 16, 128, 4, 4, 4]}}}

An entry is Config's fields in order. Rows are bucketed to powers of two. A device without a file gets the rule; nothing
is tuned unless `tune.tune` is called, which `benchmarks/gpu.py --tune` does.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import NamedTuple

import torch

from .device import Card, card
from .layout import BY_BYTES, Packed

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "profiles" / "triton"
LARGEST_BUCKET = 8192


class Config(NamedTuple):
    """A launch.

    route   "gemm" or "dequantize"
    bm, bn  tokens and outputs a tile; split: parts that K is split into
    """

    route: str
    bm: int
    bn: int
    warps: int
    stages: int
    split: int


class Key(NamedTuple):
    """What configurations are tuned for, beside the device and the rows. group_size 0: one scale a row."""

    kind: str
    bits: int
    group_size: int
    zero: bool
    dtype: torch.dtype
    padded_n: int
    in_features: int

    @classmethod
    def of(cls, p: Packed, dtype: torch.dtype) -> Key:
        return cls(p.kind, p.bits, p.group, p.zero is not None, dtype, p.words.shape[1], p.in_features)

    def text(self) -> str:
        group = f" g{self.group_size}" if self.group_size else ""
        zero = " z" if self.zero else ""
        return f"{self.kind}{self.bits}{group}{zero} {str(self.dtype)[6:]} {self.padded_n}x{self.in_features}"


def bucket(rows: int) -> int:
    """The power of two, at least `rows`, that rows are tuned for."""
    return min(1 << (rows - 1).bit_length(), LARGEST_BUCKET)


def scale_sums(kind: str, dtype: torch.dtype, bm: int) -> bool:
    """Whether a group's sum is scaled rather than its weights: cheaper up to 32 tokens. Not for small floats in
    bfloat16, which need a multiplication each anyway, nor nvfp4, whose groups are too short."""
    if kind == "nvfp4" or (kind in ("mxfp4", "fp8") and dtype == torch.bfloat16):
        return False
    return bm <= 32


def rule(key: Key, rows: int, processors: int, amd: bool = False) -> Config:
    """What to launch on a device nobody has tuned for, with that many processors (SMs, CUs)."""
    blocks = -(-key.in_features // (512 // key.bits))
    if rows >= 512:
        return Config("dequantize", 0, 0, 0, 0, 1)
    # Weights of a byte, and codebooks, whose pairs are loaded, spill beside 64 tokens at four warps.
    if rows <= (32 if key.bits == 8 or key.kind in BY_BYTES else 64):
        bm = max(16 if amd else 8, bucket(rows))
        # A wide tile spreads what a turn of the loop costs beside its weights; 64 tokens leave registers for half.
        bn = 128 if bm <= 32 else 64
        stages = 2 if amd else 4
        return Config("gemm", bm, bn, 4, stages, _split(key.padded_n // bn, blocks, 3 * processors))
    bm = 64 if amd or rows <= 64 * 3 else 128  # 128 x 128 fills RDNA's registers
    tiles = key.padded_n // 128 * -(-rows // bm)
    return Config("gemm", bm, 128, 8, 2 if amd else 3, _split(tiles, blocks, processors))


def _split(tiles: int, blocks: int, wanted: int) -> int:
    """A power of two: as many parts as fill `wanted` programs, each of at least four blocks."""
    split = 1
    while tiles * split * 2 <= wanted and blocks // (split * 2) >= 4 and split < 16:
        split *= 2
    return split


def path_of(device_name: str, folder: pathlib.Path | None = None) -> pathlib.Path:
    return (folder or FOLDER) / ("".join(c if c.isalnum() else "-" for c in device_name.lower()) + ".json")


def save(path: pathlib.Path, device: str, tuned: dict[str, dict[str, Config]]) -> None:
    """Writes a cache file, sorted, so that the same configurations are the same bytes."""
    import triton

    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"device": device, "triton": triton.__version__, "configs": tuned}
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def load(path: pathlib.Path) -> dict[str, dict[int, Config]]:
    """Key text -> bucket -> configuration; empty where there is no file. Raises ValueError for a file that is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())["configs"]
        return {k: {int(b): _config(c) for b, c in v.items()} for k, v in found.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{path} is not a cache of launch configurations: {e!r}") from e


def _config(fields: list) -> Config:
    c = Config(*fields)
    if c.route not in ("gemm", "dequantize") or any(type(v) is not int or v < 0 for v in c[1:]):
        raise ValueError(f"{fields} is no configuration")
    return c


@functools.lru_cache
def _tuned(name: str) -> dict[str, dict[int, Config]]:
    return load(path_of(name))


@functools.lru_cache(maxsize=4096)
def _chosen(key: Key, rows: int, on: Card) -> Config:
    return _tuned(on.name).get(key.text(), {}).get(rows) or rule(key, rows, on.processors, on.amd)


def choose(key: Key, rows: int, device: torch.device) -> Config:
    """The tuned configuration for the bucket of `rows`, else the rule's."""
    return _chosen(key, bucket(rows), card(device))


def forget() -> None:
    """Reads the caches again on the next product."""
    _chosen.cache_clear()
    _tuned.cache_clear()
