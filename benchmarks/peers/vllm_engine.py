"""One vLLM engine that measures when told to: the other end of vllm_decode.py. Knows nothing of qkit.

    python -c "import vllm_engine; vllm_engine.main()" FOLDER MAX_LENGTH MAX_BATCH eager|compiled

A module and not a script, so that the functions below are found by name in vLLM's worker process. Commands come as
JSON lines on stdin; answers go to stdout after the word RESULT, among vLLM's own lines.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 32  # of a profile
SHOWN = 15


def start_profile(worker: Any) -> None:
    import torch

    worker.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    worker.profile.start()


def stop_profile(worker: Any) -> list[tuple[str, int, float]]:
    """(operator, calls, microseconds of its own) in this worker, longest first."""
    worker.profile.stop()
    events = worker.profile.key_averages()
    rows = sorted(((e.key, e.count, e.self_cpu_time_total) for e in events), key=lambda row: -row[2])
    del worker.profile
    return rows


class Engine:
    def __init__(self, folder: str, max_length: int, max_batch: int, eager: bool):
        from vllm import LLM

        there = any(Path(folder).glob("*.safetensors"))
        self.llm = LLM(
            folder,
            load_format="auto" if there else "dummy",
            dtype="bfloat16",
            max_model_len=max_length,
            max_num_seqs=max_batch,
            max_num_batched_tokens=max(2048, max_length),
            enforce_eager=eager,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=False,  # or requests have no times
        )
        self.vocab = self.llm.llm_engine.model_config.get_vocab_size()
        self.turn = 0

    def generate(self, batch: int, prompt: int, new: int) -> tuple[float, float]:
        """Seconds for `new` tokens after `prompt`, for each of `batch` sequences, all different; of them those after
        the first token, the mean over the sequences."""
        from vllm import SamplingParams

        self.turn += 1
        ids = [[(7 + 31 * j + 17 * i + self.turn) % self.vocab for j in range(prompt)] for i in range(batch)]
        params = SamplingParams(max_tokens=new, min_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        done = self.llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert all(len(r.outputs[0].token_ids) == new for r in done)
        return seconds, sum(r.metrics.last_token_ts - r.metrics.first_token_ts for r in done) / batch

    def measure(self, batch: int, prompt: int, new: int) -> dict[str, float]:
        """Tokens per second, all sequences together. Decode: what the tokens after the first take."""
        seconds, rest = self.generate(batch, prompt, new)
        return {"prefill": batch * prompt / (seconds - rest), "decode": batch * (new - 1) / rest}

    def profile(self, batch: int) -> dict[str, Any]:
        """Where a decode step goes: microseconds per step of each operator, in the worker process."""
        self.generate(batch, 1, STEPS)
        wall = self.generate(batch, 1, STEPS)[0] / STEPS
        self.llm.collective_rpc(start_profile)
        self.generate(batch, 1, STEPS)
        (rows,) = self.llm.collective_rpc(stop_profile)
        return {
            "wall_us": wall * 1e6,  # without the profiler
            "operators_us": sum(us for _, _, us in rows) / STEPS,  # with it
            "operators": [[name, calls / STEPS, us / STEPS] for name, calls, us in rows[:SHOWN]],
        }


def main() -> None:
    folder, length, batch, mode = sys.argv[1:5]
    engine = Engine(folder, int(length), int(batch), mode == "eager")
    say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        say(getattr(engine, command.pop("do"))(**command))


def say(answer: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(answer), flush=True)
