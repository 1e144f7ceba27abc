"""`generate` timed as a call, and prefill and decode step by step; the memory bandwidth they are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..models.cache_name import cache_name
from . import memory
from .types import Speed

if TYPE_CHECKING:
    import torch

REPEATS = 3
GENERATED = 64
_CEILING_BYTES = 256 << 20  # well past any cache, so that the read comes from memory
_NO_TOKEN = 2**31 - 1  # ends no text; min_new_tokens would look through the vocabulary for each token
_CEILING_SECONDS = 0.3  # what else the machine does may pause meanwhile

FORMULAS = {
    "generate tokens/s": "model.generate, greedy, of a fixed number of new tokens: batch x (new tokens - 1) / time "
    "from the first new token to the end of the call, over all repeats; the headline, and what --min-tps holds for",
    "with prompt tokens/s": "the same calls: batch x new tokens / time of the whole call, its prompt included",
    "bare step tokens/s": "batch x decode steps / sum of their times: forward and argmax in a loop, without what "
    "generate does around them",
    "TTFT": "time from the call to the first new token: the forward pass over the prompt and one argmax; "
    "median over repeats, after one warm-up",
    "TPOT": "time of one bare decode step (one new token per sequence, greedy); p50 and p99 over all steps of all "
    "repeats",
    "prefill tokens/s": "batch x prompt tokens / median TTFT",
    "effective read GB/s": "bytes of weights a step reads / TPOT p50 / 1e9; an input embedding not tied to the "
    "output head is a lookup and does not count",
    "read ceiling GB/s": "bytes / time of the fastest of several passes of torch.sum over a float32 tensor of 256 MiB, "
    "for a third of a second",
}


@dataclass
class _Times:
    """Seconds of one model, as `Speed` names them."""

    generate: list[float] = field(default_factory=list)
    generate_tail: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)


def measure(
    models: Sequence[Any],
    prompt: torch.Tensor,
    ceiling: float,
    progress: Callable[[float], None] | None = None,
    *,
    repeats: int,
    generated: int,
) -> list[Speed]:
    """Greedy generation after `prompt` int64 [batch, tokens]: a short warm-up, then `repeats` timed runs each, once by
    `generate` and once by bare steps.

    The models take turns run by run, so that what else the machine does falls on all of them alike.
    progress(1) is called after each turn, warm-ups included: (repeats + 1) x models in all.
    """
    advance = progress or (lambda amount: None)
    prompts = [prompt.to(model.device) for model in models]
    for model, ids in zip(models, prompts, strict=True):
        generate(model, ids, 2)
        steps(model, ids, 2)
        advance(1)
    times = [_Times() for _ in models]
    for _ in range(repeats):
        for model, ids, seen in zip(models, prompts, times, strict=True):
            call, tail = generate(model, ids, generated)
            seen.generate.append(call)
            seen.generate_tail.append(tail)
            first, rest, _ = steps(model, ids, generated)
            seen.ttft.append(first)
            seen.tpot += rest
            advance(1)
    return [
        _speed(len(prompt), prompt.shape[1], generated, seen, memory.read_per_token(model), ceiling)
        for model, seen in zip(models, times, strict=True)
    ]


def pooled(speeds: Sequence[Speed], read: int | None, ceiling: float) -> Speed:
    """One model's runs of several times, all at one batch size, as one. read: `memory.read_per_token` of it."""
    seen = _Times()
    for each in speeds:
        seen.generate += each.generate
        seen.generate_tail += each.generate_tail
        seen.ttft += each.ttft
        seen.tpot += each.tpot
    first = speeds[0]
    return _speed(first.batch, first.prompt, first.generated, seen, read, ceiling)


def _speed(batch: int, tokens: int, generated: int, seen: _Times, read: int | None, ceiling: float) -> Speed:
    p50 = percentile(seen.tpot, 50)
    read_gbs = None if read is None else read / p50 / 1e9
    calls = batch * len(seen.generate)
    return Speed(
        batch=batch,
        prompt=tokens,
        generated=generated,
        generate=tuple(seen.generate),
        generate_tail=tuple(seen.generate_tail),
        generate_tps=calls * (generated - 1) / sum(seen.generate_tail),
        generate_call_tps=calls * generated / sum(seen.generate),
        ttft=tuple(seen.ttft),
        tpot=tuple(seen.tpot),
        ttft_median=percentile(seen.ttft, 50),
        tpot_p50=p50,
        tpot_p99=percentile(seen.tpot, 99),
        prefill_tps=batch * tokens / percentile(seen.ttft, 50),
        decode_tps=batch * len(seen.tpot) / sum(seen.tpot),
        read_gbs=read_gbs,
        read_share=None if read_gbs is None else read_gbs / ceiling,
    )


class _Clock:
    """A streamer that notes when each group of tokens comes: the prompt's first, then one new token a sequence."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, tokens: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, prompt: torch.Tensor, count: int) -> tuple[float, float]:
    """(seconds of one call of `model.generate` for `count` new tokens, of it those after the first new token).

    Raises RuntimeError where it gives another number of tokens."""
    import torch
    from transformers import GenerationConfig

    chosen = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=count,
        eos_token_id=_NO_TOKEN,
        pad_token_id=0,
    )
    clock = _Clock()
    started = _now(model.device)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=chosen, streamer=clock)
    ended = _now(model.device)
    if out.shape[1] != prompt.shape[1] + count or len(clock.at) < 2:
        raise RuntimeError(f"generate gave {out.shape[1] - prompt.shape[1]} new tokens, not {count}")
    return ended - started, ended - clock.at[1]


def steps(model: Any, prompt: torch.Tensor, count: int) -> tuple[float, list[float], Any]:
    """Bare forward steps: (seconds to the first token, of each of the count - 1 further steps, cache)."""
    import torch

    name = cache_name()
    with torch.inference_mode():
        started = _now(model.device)
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(dim=-1)
        last = _now(model.device)
        first, each = last - started, []
        for _ in range(count - 1):
            out = model(input_ids=token, **{name: out[name]}, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(dim=-1)
            now = _now(model.device)
            each.append(now - last)
            last = now
    return first, each, out[name]


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
    best, end = float("inf"), _now(device) + _CEILING_SECONDS
    while (started := _now(device)) < end:
        data.sum()
        best = min(best, _now(device) - started)
    return _CEILING_BYTES / best / 1e9
