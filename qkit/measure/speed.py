"""Prefill and decode, timed step by step; and the memory bandwidth they are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
    models: Sequence[Any],
    prompt: torch.Tensor,
    ceiling: float,
    progress: Callable[[float], None] | None = None,
    *,
    repeats: int,
    generated: int,
) -> list[Run]:
    """Greedy generation after `prompt` int64 [batch, tokens]: a short warm-up, then `repeats` timed runs each.

    The models take turns run by run, so that what else the machine does falls on all of them alike.
    progress(1) is called after each run, warm-ups included: (repeats + 1) x models in all.
    """
    advance = progress or (lambda amount: None)
    prompts = [prompt.to(model.device) for model in models]
    peaks = []
    for model, ids in zip(models, prompts, strict=True):
        with memory.peak(model.device) as seen:
            _, _, cache = _generate(model, ids, 2)
            peak, source = seen()
        peaks.append((max(0, peak - memory.cache_bytes(cache)), source))
        del cache
        advance(1)
    ttft: list[list[float]] = [[] for _ in models]
    tpot: list[list[float]] = [[] for _ in models]
    kv: list[tuple[int, int]] = [(0, 0)] * len(models)
    for _ in range(repeats):
        for i, (model, ids) in enumerate(zip(models, prompts, strict=True)):
            first, steps, cache = _generate(model, ids, generated)
            ttft[i].append(first)
            tpot[i] += steps
            kv[i] = (memory.cache_bytes(cache), memory.cache_tokens(cache))
            del cache
            advance(1)
    runs = []
    for i, model in enumerate(models):
        speed = _speed(prompt, generated, ttft[i], tpot[i], memory.read_per_token(model), ceiling)
        runs.append(Run(speed, *kv[i], *peaks[i]))
    return runs


def _speed(
    prompt: torch.Tensor, generated: int, ttft: list[float], tpot: list[float], read: int | None, ceiling: float
) -> Speed:
    batch, tokens = prompt.shape
    p50 = percentile(tpot, 50)
    read_gbs = None if read is None else read / p50 / 1e9
    return Speed(
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
