"""What an engine is told, and what follows from it for every kind of layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from ..errors import QkitError
from ..models.architecture import Architecture, Cache
from ..spec.dtypes import ITEMSIZE
from ..spec.ggml import GGML


@dataclass(frozen=True)
class Setting:
    """What an engine is told. One rank's share is counted.

    tp              ranks that divide a layer's heads; where there are fewer KV heads than ranks, each rank has one, and
                    a latent is on every rank whole
    state_dtype     of states that need no type of their own: the model's; recurrent_dtype: of those of a recurrence,
                    where the config does not say (vLLM's --mamba-ssm-cache-dtype, float32 on CPUs with AVX-512 BF16)
    block           tokens of a page of vLLM's; 16 unless told otherwise (64 with some MLA kernels, 128 on CPUs)
    in_flight       tokens that vLLM schedules in a step: what a sliding layer may hold beside its window
    ubatch          the same of llama.cpp
    encoder_tokens  of an encoder's output; None: as many as the decoder's
    """

    tp: int = 1
    state_dtype: str = "BF16"
    recurrent_dtype: str | None = None
    block: int = 16
    in_flight: int = 2048
    ubatch: int = 512
    encoder_tokens: int | None = None


def value_bytes(dtype: str) -> Fraction:
    """Bytes of one value, which in ggml's block types is no whole number."""
    if dtype in ITEMSIZE:
        return Fraction(ITEMSIZE[dtype])
    if dtype in GGML:
        return Fraction(GGML[dtype].block_bytes, GGML[dtype].block_size)
    raise QkitError(f"{dtype!r} is no type of a KV cache", "use BF16, F16, F32, F8_E4M3, Q8_0, Q4_0, ...")


def state_bytes(cache: Cache, s: Setting) -> Fraction:
    """Bytes of one value of a state, as engines hold it; transformers computes what is a recurrence in float32."""
    recurrent = s.recurrent_dtype if cache.wide_dtype else None
    return value_bytes(cache.fixed_dtype or recurrent or s.state_dtype)


def share(cache: Cache, tp: int) -> Fraction:
    """The part of a layer's cache that one rank holds."""
    if cache.kind == "state":
        return Fraction(1, tp)
    return Fraction(max(1, -(-cache.kv_heads // tp)), cache.kv_heads) if cache.kv_heads else Fraction(1)


def caches(arch: Architecture) -> Iterator[Cache]:
    for layer in arch.layers:
        yield from layer.caches


def seen(cache: Cache, tokens: int, s: Setting) -> int:
    """Tokens of an encoder's output that a cross-attention layer keeps."""
    return cache.window or s.encoder_tokens or tokens
