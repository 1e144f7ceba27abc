"""Runs one engine's sweep, in a process of its own and with the engine's own Python, which need not have qkit: this
file and the adapters (run_*.py) import the standard library and their engine alone.

Reads a request as JSON on stdin: {"adapter": path, "settings": {...}, "tokens": [...], "points": [...], "repeats": n,
"budget": seconds}. Writes answers as JSON, a line each, to what was stdout when it started; whatever else prints there
goes to stderr. {"ready": ...}, then {"point": index, ...} for each point, {"problem": ...} where it cannot go on.

An adapter has a class `Engine(settings)`:
    version, settings, max_context    what runs, what it was told and says of itself, the most tokens of a sequence
    run(prompts, generated)           (seconds to the first token of every sequence, [seconds of each further step])
    generate(prompts, generated)      (seconds of the engine's own generate, of it those after the first token), or None
    reset_peak(), peak()              optional: bytes on a GPU; without them the memory of this process and its children
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

WARM_UP = 2  # new tokens: a prefill and a decode step


def main() -> None:
    # Libraries print to stdout as they like, C++ among them: the answers keep a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**answer) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        request = json.load(sys.stdin)
        engine = runpy.run_path(request["adapter"])["Engine"](request["settings"])
        say(ready={"version": engine.version, "settings": engine.settings})
    except Exception as error:
        say(problem=words(error))
        return
    costs: list[tuple[int, float]] = []  # tokens of a prefill, its seconds
    for index, point in enumerate(request["points"]):
        say(begun=index)
        try:
            say(point=index, **measure(engine, point, request["tokens"], request["repeats"], request["budget"], costs))
        except Exception as error:  # the engine's own, of any class: the other points may still work
            say(point=index, skipped=words(error))


def words(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first}".rstrip(": ")


def measure(engine, point: dict, tokens: list[int], repeats: int, budget: float, costs: list) -> dict:
    """One point: a warm-up, then as many of `repeats` timed runs as the budget of seconds has room for, at least one.

    Skipped where its two prefills alone would take more, token for token as the fastest smaller one so far: a longer
    prompt takes no less."""
    batch, prompt, generated = point["batch"], point["prompt"], point["generated"]
    if engine.max_context is not None and prompt + generated > engine.max_context:
        return {"skipped": f"the engine takes {engine.max_context} tokens"}
    size = batch * prompt
    done, seconds = min((c for c in costs if c[0] < size), key=lambda c: c[1] / c[0], default=(size, 0.0))
    expected = 2 * seconds * size / done
    if expected > budget:
        return {
            "skipped": f"a warm-up and a run would prefill for {expected:.0f} s or more, going by {done:,} tokens in "
            f"{seconds:.1f} s; a point may take {budget:.0f} s"
        }
    prompts = [turned(tokens, 97 * row)[:prompt] for row in range(batch)]
    reset_peak, peak = getattr(engine, "reset_peak", reset_tree), getattr(engine, "peak", tree_peak)
    began = time.perf_counter()
    first, steps = engine.run(prompts, WARM_UP)
    called = engine.generate(prompts, WARM_UP)
    costs.append((size, first))
    left = budget - (time.perf_counter() - began)
    each = (first + generated * sum(steps) / max(1, len(steps))) * (1 if called is None else 2)
    fitting = max(1, min(repeats, int(left / each) if each > 0 else repeats))
    seen = reset_peak()
    ttft, tpot, calls = [], [], []
    for _ in range(fitting):
        first, steps = engine.run(prompts, generated)
        ttft.append(first)
        tpot += steps
        called = engine.generate(prompts, generated)
        if called is not None:
            calls.append(called)
    costs.append((size, min(ttft)))
    return {"warmups": 1, "ttft": ttft, "tpot": tpot, "generate": calls, "peak_bytes": peak() if seen else None}


def turned(tokens: list[int], by: int) -> list[int]:
    """The tokens from another place on, so that the sequences of a batch differ: the first stays, which may be BOS."""
    rest = tokens[1:]
    by %= max(1, len(rest))
    return [tokens[0], *rest[by:], *rest[:by]]


def reset_tree() -> bool:
    """Count the peak memory of this process and its children from now on; False where the system does not."""
    try:
        for pid in tree():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True


def tree_peak() -> int | None:
    """Bytes: the sum of the peaks of this process and its children; pages that they share count in each."""
    total = 0
    for pid in tree():
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return total or None


def tree() -> list[int]:
    """This process and all that descend from it."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


if __name__ == "__main__":
    main()
