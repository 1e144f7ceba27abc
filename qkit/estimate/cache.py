"""Bytes of the KV cache, as each engine allocates it: by kind of layer, and the formula with its numbers.

Rules: transformers 5.23, cache_utils.py (DynamicCache, StaticCache); vLLM: see `paged`; llama.cpp: llama-kv-cache.cpp,
llama-kv-cache-iswa.cpp and llama-memory-recurrent.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from ..errors import QkitError
from ..models.architecture import Architecture, Cache
from ..spec.dtypes import ITEMSIZE
from ..spec.ggml import GGML
from .kv import Kv, Part
from .paged import paged

ENGINES = ("transformers", "static", "vllm", "llama.cpp", "qkit")
_CELLS = 256  # llama.cpp rounds the tokens of a sequence up to these


@dataclass(frozen=True)
class Setting:
    """What an engine is told. One rank's share is counted.

    tp              ranks that divide a layer's heads; where there are fewer KV heads than ranks, each rank has one, and
                    a latent is on every rank whole
    state_dtype     of states that need no type of their own: the model's
    block           tokens of a page of vLLM's; 16 unless told otherwise (64 with some MLA kernels, 128 on CPUs)
    in_flight       tokens that vLLM schedules in a step: what a sliding layer may hold beside its window
    ubatch          the same of llama.cpp
    encoder_tokens  of an encoder's output; None: as many as the decoder's
    """

    tp: int = 1
    state_dtype: str = "BF16"
    block: int = 16
    in_flight: int = 2048
    ubatch: int = 512
    encoder_tokens: int | None = None


def kv_bytes(
    arch: Architecture,
    tokens: int,
    batch: int = 1,
    dtype: str = "BF16",
    engine: str = "transformers",
    setting: Setting | None = None,
) -> int:
    """Bytes that `batch` sequences of `tokens` tokens take. See `kv`."""
    return kv(arch, tokens, batch, dtype, engine, setting).total


def kv(
    arch: Architecture,
    tokens: int,
    batch: int = 1,
    dtype: str = "BF16",
    engine: str = "transformers",
    setting: Setting | None = None,
) -> Kv:
    """What `batch` sequences of `tokens` tokens take, by kind of layer.

    dtype   of keys and values: a type of safetensors, or of ggml ("Q8_0")
    engine  "transformers" (DynamicCache; "qkit" runs on it), "static" (its StaticCache), "vllm", "llama.cpp"
    Raises QkitError for another engine or type."""
    s = setting or Setting()
    if min(tokens, s.tp, s.block, batch) < 1:
        raise QkitError("tokens, batch, tensor parallelism and block size are 1 or more")
    size = value_bytes(dtype)
    if engine == "vllm":
        return paged(arch, tokens, batch, size, value_bytes(s.state_dtype), s)
    if engine in ("transformers", "qkit", "static"):
        parts = _transformers(arch, tokens, batch, size, engine == "static", s)
    elif engine == "llama.cpp":
        parts = _llama_cpp(arch, tokens, batch, size, s)
    else:
        raise QkitError(f"unknown engine {engine!r}", "known: " + ", ".join(ENGINES))
    return Kv.of(parts)


def value_bytes(dtype: str) -> Fraction:
    """Bytes of one value, which in ggml's block types is no whole number."""
    if dtype in ITEMSIZE:
        return Fraction(ITEMSIZE[dtype])
    if dtype in GGML:
        return Fraction(GGML[dtype].block_bytes, GGML[dtype].block_size)
    raise QkitError(f"{dtype!r} is no type of a KV cache", "use BF16, F16, F32, F8_E4M3, Q8_0, Q4_0, ...")


def share(cache: Cache, tp: int) -> Fraction:
    """The part of a layer's cache that one rank holds."""
    if cache.kind == "state":
        return Fraction(1, tp)
    return Fraction(max(1, -(-cache.kv_heads // tp)), cache.kv_heads) if cache.kv_heads else Fraction(1)


def caches(arch: Architecture) -> Iterator[Cache]:
    for layer in arch.layers:
        yield from layer.caches


def _cross(cache: Cache, tokens: int, batch: int, size: Fraction, s: Setting) -> Part:
    seen = cache.window or s.encoder_tokens or tokens
    return Part.of("cross", cache.per_token, seen, batch, size, share(cache, s.tp))


def _transformers(
    arch: Architecture, tokens: int, batch: int, size: Fraction, static: bool, s: Setting
) -> Iterable[Part]:
    for cache in caches(arch):
        if cache.kind == "state":
            own = value_bytes(cache.wide_dtype or s.state_dtype)
            yield Part.of(cache.kind, cache.wide, 1, batch, own, share(cache, s.tp))
        elif cache.kind == "cross":
            yield _cross(cache, tokens, batch, size, s)
        else:
            kept = tokens
            if cache.window is not None:
                # Between steps a dynamic cache has no use for the oldest token that the newest saw.
                kept = min(tokens, cache.window if static else max(1, cache.window - 1))
            yield Part.of(cache.kind, cache.per_token, kept, batch, size, share(cache, s.tp))


def _llama_cpp(arch: Architecture, tokens: int, batch: int, size: Fraction, s: Setting) -> Iterable[Part]:
    cells = _rounded(tokens, _CELLS)
    for cache in caches(arch):
        if cache.kind == "state":
            yield Part.of(cache.kind, cache.fixed, 1, batch, Fraction(4), share(cache, s.tp))
        elif cache.kind == "cross":
            yield _cross(cache, tokens, batch, size, s)
        else:
            kept = cells
            if cache.window is not None:
                kept = min(cells, _rounded(cache.window + s.ubatch, _CELLS))
            yield Part.of(cache.kind, cache.per_token, kept, batch, size, share(cache, s.tp))


def _rounded(n: int, to: int) -> int:
    return -(-n // to) * to
