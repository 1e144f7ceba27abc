"""Prefill and decode, timed step by step; and the memory bandwidth they are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import memory
from .types import Speed

if TYPE_CHECKING:
    import torch

REPEATS = 3
GENERATED = 64
_CEILING_BYTES = 256 << 20  # well past any cache, so that the read comes from memory

FORMULAS = {
    "TTFT": "time from the call to the first new token: the forward pass over the prompt and one argmax; "
    "median over repeats, after one warm-up",
    "TPOT": "time of one decode step (one new token per sequence, greedy); p50 and p99 over all steps of all repeats",
    "prefill tokens/s": "batch x prompt tokens / median TTFT",
    "decode tokens/s": "batch x decode steps / sum of their times",
    "effective read GB/s": "bytes of weights a step reads / TPOT p50 / 1e9; an input embedding not tied to the "
    "output head is a lookup and does not count",
    "read ceiling GB/s": "bytes / time of the fastest of several passes of torch.sum over a float32 tensor of 256 MiB",
}


@dataclass(frozen=True)
class Run:
    """What one batch size showed, with the cache it left."""

    speed: Speed
    kv_bytes: int
    kv_tokens: int
    activations: int
    activations_source: str


def measure(
    model: Any,
    prompt: torch.Tensor,
    weight_bytes: int,
    ceiling: float,
    progress: Callable[[float], None] | None = None,
    *,
    repeats: int = REPEATS,
    generated: int = GENERATED,
) -> Run:
    """Greedy generation after `prompt` int64 [batch, tokens]: one short warm-up, then `repeats` timed runs.

    progress(1) is called after each run, the warm-up included (repeats + 1 in all).
    """
    batch, tokens = prompt.shape
    prompt = prompt.to(model.device)
    ttft: list[float] = []
    tpot: list[float] = []
    with memory.peak(model.device) as seen:
        _, _, cache = _generate(model, prompt, 2)
        peak, source = seen()
    activations = max(0, peak - memory.cache_bytes(cache))
    del cache
    if progress:
        progress(1)
    for _ in range(repeats):
        first, steps, cache = _generate(model, prompt, generated)
        ttft.append(first)
        tpot += steps
        if progress:
            progress(1)
    read = memory.read_per_token(model, weight_bytes)
    p50 = percentile(tpot, 50)
    read_gbs = None if read is None else read / p50 / 1e9
    speed = Speed(
        batch=batch,
        prompt=tokens,
        generated=generated,
        ttft=tuple(ttft),
        tpot=tuple(tpot),
        ttft_median=percentile(ttft, 50),
        tpot_p50=p50,
        tpot_p99=percentile(tpot, 99),
        prefill_tps=batch * tokens / percentile(ttft, 50),
        decode_tps=batch * len(tpot) / sum(tpot),
        read_gbs=read_gbs,
        read_share=None if read_gbs is None else read_gbs / ceiling,
    )
    return Run(speed, memory.cache_bytes(cache), memory.cache_tokens(cache), activations, source)


def _generate(model: Any, prompt: torch.Tensor, count: int) -> tuple[float, list[float], Any]:
    """(seconds to the first token, seconds of each of the count - 1 further steps, cache)."""
    import torch

    with torch.inference_mode():
        started = _now(model.device)
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(dim=-1)
        last = _now(model.device)
        first, steps = last - started, []
        for _ in range(count - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(dim=-1)
            now = _now(model.device)
            steps.append(now - last)
            last = now
    return first, steps, out.past_key_values


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def percentile(values: list[float], p: float) -> float:
    import numpy as np

    return float(np.percentile(values, p))


def read_ceiling(device: torch.device) -> float:
    """GB/s at which this device reads memory, measured (see FORMULAS)."""
    import torch

    data = torch.ones(_CEILING_BYTES // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(8):
        started = _now(device)
        data.sum()
        best = min(best, _now(device) - started)
    return _CEILING_BYTES / best / 1e9
