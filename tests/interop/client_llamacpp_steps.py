"""Runs inside llama-cpp-python's own environment: what qkit's adapter for sweeps generates, and what Llama does.

Usage: client_llamacpp_steps.py JOB.json, {"adapter": path, "model": path, "prompts": [[...]], "generated": n}. Prints
{"adapter": [[...]], "llama": [[...]], "first": seconds, "steps": [seconds]} as the last line."""

import json
import runpy
import sys
from pathlib import Path

from llama_cpp import Llama


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    prompts, count = job["prompts"], job["generated"]
    own = []
    # The adapter has llama.cpp's own default, which is flash attention where there is one; the class Llama has not.
    model = Llama(job["model"], n_ctx=512, n_threads=2, flash_attn=True, verbose=False)
    for prompt in prompts:
        model.reset()
        given = model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        own.append([int(next(given)) for _ in range(count)])
    del model
    settings = {"model": job["model"], "device": "cpu", "threads": 2, "generated": count}
    engine = runpy.run_path(job["adapter"])["Engine"](settings)
    sampled = []
    sample = engine._sample
    engine._sample = lambda index: sampled.append(sample(index)) or sampled[-1]
    first, steps = engine.run(prompts, count)
    rows = [sampled[row :: len(prompts)] for row in range(len(prompts))]
    print(json.dumps({"adapter": rows, "llama": own, "first": first, "steps": steps}))


if __name__ == "__main__":
    main(sys.argv[1])
