"""The sweep's adapter for GGUF files in llama.cpp, through the low-level interface of llama-cpp-python (see
sweep_worker.py).

A step is one llama_decode of a token a sequence and the greedy sampler of each, which is llama.cpp's own way to
generate: there is no call around it. Needs llama-cpp-python alone."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as llama

# A callback that is collected while llama.cpp may call it ends the process.
_quiet = llama.llama_log_callback(lambda level, text, user_data: None)
_ROUND = 256  # llama.cpp pads each sequence's cache to a multiple of it


class Engine:
    max_context: int | None
    chunk: int
    batch: Any

    def __init__(self, settings: dict[str, Any]):
        llama.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self.device, self.threads = settings["device"], settings["threads"]
        self.room = settings["generated"]  # after the prompt, in the warm-up too: both then use one context
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0 if self.device == "cpu" else 2**31 - 1
        if self.device != "cpu" and not llama.llama_supports_gpu_offload():
            raise RuntimeError(f"this llama.cpp is built without support for {self.device}")
        self.model = llama.llama_model_load_from_file(settings["model"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {settings['model']}")
        self.max_context = int(llama.llama_model_n_ctx_train(self.model)) or None
        self.sampler = llama.llama_sampler_init_greedy()
        self.version = f"llama-cpp-python {llama.__version__}"
        defaults = self._params(1, _ROUND)
        self.settings = {
            "device": self.device,
            "threads": self.threads,
            "n_batch": defaults.n_batch,
            "n_ubatch": defaults.n_ubatch,
            "system": llama.llama_print_system_info().decode(errors="replace").strip(),
        }
        self.shape, self.context = (0, 0), None

    def _params(self, sequences: int, tokens: int) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = sequences * -(-tokens // _ROUND) * _ROUND
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        return params

    def run(self, prompts: list[list[int]], generated: int) -> tuple[float, list[float]]:
        self._open(len(prompts), len(prompts[0]) + max(generated, self.room))
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        started = time.perf_counter()
        last, place = [], len(prompts[0])
        for row, prompt in enumerate(prompts):
            for at in range(0, place, self.chunk):
                part = prompt[at : at + self.chunk]
                ends = at + len(part) == place
                self._decode([(token, at + i, row) for i, token in enumerate(part)], only_last=True)
                if ends:
                    last.append(self._sample(len(part) - 1))
        now = time.perf_counter()
        first, steps = now - started, []
        for step in range(generated - 1):
            self._decode([(token, place + step, row) for row, token in enumerate(last)], only_last=False)
            last = [self._sample(row) for row in range(len(last))]
            before, now = now, time.perf_counter()
            steps.append(now - before)
        return first, steps

    def generate(self, prompts: list[list[int]], generated: int) -> None:
        return None

    def _open(self, sequences: int, tokens: int) -> None:
        """A context for this many sequences of this many tokens; the one before it is freed first."""
        if (sequences, tokens) == self.shape:
            return
        if self.context:
            llama.llama_batch_free(self.batch)
            llama.llama_free(self.context)
            self.context = None
        params = self._params(sequences, tokens)
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {sequences} x {tokens} tokens")
        self.chunk = int(params.n_batch)
        self.batch = llama.llama_batch_init(self.chunk, 0, 1)
        self.shape = (sequences, tokens)

    def _decode(self, tokens: list[tuple[int, int, int]], only_last: bool) -> None:
        """(token, position, sequence) each; logits of the last one or of all."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = not only_last or i == len(tokens) - 1
        code = llama.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")

    def _sample(self, index: int) -> int:
        return int(llama.llama_sampler_sample(self.sampler, self.context, index))
