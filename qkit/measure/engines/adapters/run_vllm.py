"""The sweep's adapter for vLLM's offline engine (see sweep_worker.py). Needs vLLM alone.

Steps are those of the loop that LLM.generate runs: schedule, forward, sample, hand out. There is no barer one."""

from __future__ import annotations

import time
from typing import Any


class Engine:
    def __init__(self, settings: dict[str, Any]):
        import vllm
        from vllm.platforms import current_platform

        kind = settings["device"].partition(":")[0]
        if current_platform.device_type != kind:
            raise RuntimeError(f"this vLLM is built for {current_platform.device_type}, not for {kind}")
        given = {
            "max_model_len": settings["max_context"],
            "max_num_seqs": settings["max_batch"],
            "enable_prefix_caching": False,  # or every repeat would find its prompt computed
            **settings["arguments"],
        }
        if kind == "cpu":
            given.setdefault("kv_cache_memory_bytes", settings["cache_bytes"])
        self.llm = vllm.LLM(settings["model"], skip_tokenizer_init=True, disable_log_stats=False, **given)
        config = self.llm.llm_engine.vllm_config
        self.version = f"vllm {vllm.__version__}"
        self.max_context = int(config.model_config.max_model_len)
        self.budget = int(config.scheduler_config.max_num_batched_tokens)
        self.settings = {
            **given,
            "device": current_platform.device_type,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization,
            "max_num_batched_tokens": self.budget,
            "enforce_eager": bool(config.model_config.enforce_eager),
        }
        self.asked = 0
        if kind != "cpu":  # a share of the card that is set beforehand says nothing of a point
            self.reset_peak, self.peak = (lambda: False), (lambda: None)

    def run(self, prompts: list[list[int]], generated: int) -> tuple[float, list[float]]:
        engine, batch = self.llm.llm_engine, len(prompts)
        # Prompts that do not fit one step start one after the other: some tokens more, so that there are enough steps
        # in which every sequence gets one.
        late = -(-batch * len(prompts[0]) // self.budget) if batch > 1 else 0
        params = self._params(min(generated + late, self.max_context - len(prompts[0])))
        started = last = time.perf_counter()
        for prompt in prompts:
            self.asked += 1
            engine.add_request(str(self.asked), {"prompt_token_ids": prompt}, params)
        begun: set[str] = set()
        first: float | None = None
        steps: list[float] = []
        while engine.has_unfinished_requests():
            outputs = [output for output in engine.step() if output.outputs and output.outputs[0].token_ids]
            now = time.perf_counter()
            begun.update(output.request_id for output in outputs)
            if first is None:
                first = now - started if len(begun) == batch else None
            elif len(outputs) == batch and len(steps) < generated - 1:
                steps.append(now - last)
            last = now
        if first is None:
            raise RuntimeError(f"{len(begun)} of {batch} sequences got a token")
        return first, steps

    def generate(self, prompts: list[list[int]], generated: int) -> tuple[float, float] | None:
        """LLM.generate; the seconds after the first token are the mean over the sequences."""
        started = time.perf_counter()
        rows = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(rows, self._params(generated), use_tqdm=False)
        call = time.perf_counter() - started
        times = [output.metrics for output in outputs]
        if any(seen is None for seen in times):
            return None
        return call, sum(seen.last_token_ts - seen.first_token_ts for seen in times) / len(times)

    def _params(self, count: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
