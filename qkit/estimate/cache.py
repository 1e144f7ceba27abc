"""Bytes of the KV cache, as each engine allocates it: by kind of layer, and the formula with its numbers.

Rules: transformers 5.23, cache_utils.py (DynamicCache, StaticCache); vLLM: see `paged`; llama.cpp: llama-kv-cache.cpp,
llama-kv-cache-iswa.cpp and llama-memory-recurrent.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from ..errors import QkitError
from ..models.architecture import Architecture, Cache
from .kv import Kv, Part
from .paged import paged
from .setting import Setting, caches, seen, share, value_bytes

__all__ = ["ENGINES", "Setting", "caches", "kv", "kv_bytes", "share", "value_bytes"]

ENGINES = ("transformers", "static", "vllm", "llama.cpp", "qkit")
_CELLS = 256  # llama.cpp rounds the tokens of a sequence up to these


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
        return paged(arch, tokens, batch, size, s)
    return Kv.of(parts(arch, tokens, batch, size, engine, s))


def parts(arch: Architecture, tokens: int, batch: int, size: Fraction, engine: str, s: Setting) -> Iterable[Part]:
    """One for each cache of the layers, in their order; of engines without pages."""
    if engine in ("transformers", "qkit", "static"):
        return _transformers(arch, tokens, batch, size, engine == "static", s)
    if engine == "llama.cpp":
        return _llama_cpp(arch, tokens, batch, size, s)
    raise QkitError(f"unknown engine {engine!r}", "known: " + ", ".join(ENGINES))


def _cross(cache: Cache, tokens: int, batch: int, size: Fraction, s: Setting) -> Part:
    return Part.kept(cache, seen(cache, tokens, s), batch, size, share(cache, s.tp))


def _transformers(
    arch: Architecture, tokens: int, batch: int, size: Fraction, static: bool, s: Setting
) -> Iterable[Part]:
    for cache in caches(arch):
        if cache.kind == "state":
            own = value_bytes(cache.wide_dtype or s.state_dtype)
            yield Part.state(cache.wide, batch, own, share(cache, s.tp))
        elif cache.kind == "cross":
            yield _cross(cache, tokens, batch, size, s)
        else:
            kept = tokens
            if cache.window is not None:
                # Between steps a dynamic cache has no use for the oldest token that the newest saw.
                kept = min(tokens, cache.window if static else max(1, cache.window - 1))
            yield Part.kept(cache, kept, batch, size, share(cache, s.tp))


def _llama_cpp(arch: Architecture, tokens: int, batch: int, size: Fraction, s: Setting) -> Iterable[Part]:
    cells = _rounded(tokens, _CELLS)
    # It knows windows of models that have other layers too; one that all layers have, as Mistral's, it passes over.
    mixed = any(c.kind == "full" for c in caches(arch))
    for cache in caches(arch):
        if cache.kind == "state":
            yield Part.state(cache.fixed, batch, Fraction(4), share(cache, s.tp))
        elif cache.kind == "cross":
            yield _cross(cache, tokens, batch, size, s)
        else:
            kept = cells
            if cache.window is not None and mixed:
                kept = min(cells, _rounded(cache.window + s.ubatch, _CELLS))
            yield Part.kept(cache, kept, batch, size, share(cache, s.tp))


def _rounded(n: int, to: int) -> int:
    return -(-n // to) * to
