"""Tokens a second of `qkit.load(...).generate`, one sequence, and where a token's time goes.

For each model folder: the memory ceiling (bytes of weights a token reads over the read ceiling, ceiling.py), the
linears alone, the step as `model.forward`, `generate` (greedy), and the same through the model's own forward
(transformers' eager operations on the same packed linears), in turns; then prefill. Medians. Against other engines:
engines.py. The last line of stdout is one JSON document.

    python benchmarks/decode_speed.py FOLDER [FOLDER ...] [--tokens 64] [--prompt 512] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ceiling import Reads

import qkit
from qkit.kernels.cpu import lib
from qkit.kernels.cpu.decoder import dense
from qkit.kernels.cpu.matmul import CpuWeight
from qkit.runtime import as_decoder, decoder


def seconds(call: Callable[[], object], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def linears(model: Any) -> tuple[Callable[[], None], int]:
    """(one row through every linear of the model, bytes of their weights)."""
    calls: list[Callable[[], object]] = []
    nbytes = 0
    for linear in as_decoder.linears(model):
        w = linear.weight
        if isinstance(w, CpuWeight):
            x = torch.randn(1, w.c.cols).bfloat16()
            calls.append(lambda w=w, x=x: lib.matmul(w.c, x, None))
            nbytes += sum(t.nbytes for t in (w.codes, w.scale, w.zero) if t is not None)
        else:
            x = torch.randn(1, w.shape[1]).bfloat16()
            calls.append(lambda w=w, x=x: dense(x, w))
            nbytes += w.nbytes

    def run() -> None:
        for call in calls:
            call()

    return run, nbytes


def generate(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Seconds for `tokens` more tokens after the first."""
    start = 0.0

    class Clock:
        """A streamer: the prompt, then every token as it is made."""

        calls = 0

        def put(self, value: Any) -> None:
            nonlocal start
            self.calls += 1
            if self.calls == 2:  # the first token: prefill is over
                start = time.perf_counter()

        def end(self) -> None: ...

    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1, do_sample=False, streamer=Clock(),
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return time.perf_counter() - start


def row(folder: str, args: argparse.Namespace, reads: Reads) -> dict[str, Any]:
    model = qkit.load(folder, "cpu")
    decoder.detach(model)
    fast = decoder.attach(model) is None
    ids = torch.randint(
        0, min(model.config.vocab_size, 30000), (1, args.prompt), generator=torch.Generator().manual_seed(0)
    )
    one, short = ids[:, :1], ids[:, :32]
    run, nbytes = linears(model)
    found: dict[str, list[float]] = {}

    def note(name: str, taken: list[float]) -> None:
        found.setdefault(name, []).append(statistics.median(taken))

    with torch.no_grad():
        for round_ in range(args.rounds + 1):
            if round_ == 1:
                found.clear()  # the first warms up
            reads.sweep()
            note("linears", seconds(run, 10))
            cache = model(short, use_cache=True).past_key_values
            if fast:
                note(
                    "forward",
                    seconds(lambda cache=cache: model(input_ids=one, past_key_values=cache), args.tokens // 2),
                )
            note("generate", [generate(model, short, args.tokens) / args.tokens])
            decoder.detach(model)
            note("generate, own forward", [generate(model, short, args.tokens // 4) / (args.tokens // 4)])
            decoder.attach(model)
            note("prefill", [t / args.prompt for t in seconds(lambda: model(ids, use_cache=True), 1)])
    ms = {name: statistics.median(v) * 1e3 for name, v in found.items()}
    limit = nbytes / reads.best * 1e3
    print(f"\n{folder}: {nbytes / 1e6:.1f} MB of weights a token, {limit:.2f} ms at {reads.best / 1e9:.1f} GB/s")
    for name in ("linears", "forward", "generate", "generate, own forward"):
        if name in ms:
            share = f"{limit / ms[name]:6.0%} of the ceiling"
            print(f"  {name:24} {ms[name]:8.2f} ms a token  {1e3 / ms[name]:8.1f} tokens/s  {share}")
    speed = f"{1e3 / ms['prefill']:8.1f} tokens/s  ({args.prompt} tokens)"
    print(f"  {'prefill':24} {ms['prefill']:8.3f} ms a token  {speed}")
    return {"model": Path(folder).name, "bytes_per_token": nbytes, "ceiling_ms": limit, "ms": ms,
            "decode_tokens_per_s": 1e3 / ms["generate"], "prefill_tokens_per_s": 1e3 / ms["prefill"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    reads = Reads(torch.get_num_threads())
    rows = [row(folder, args, reads) for folder in args.folders]
    json.dump({"threads": torch.get_num_threads(), "read_gbs": reads.best / 1e9, "rows": rows}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
