"""Where a model's memory goes: weights by part, KV cache, activations."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..hardware import memory as process
from ..models.architecture import architecture

if TYPE_CHECKING:
    import torch


_EXPERT = re.compile(r"\.experts(\.|$)")


@dataclass(frozen=True)
class Weights:
    """Bytes of a loaded model's tensors, each storage counted once."""

    packed: int
    embeddings: int
    unquantized: int

    @property
    def total(self) -> int:
        return self.packed + self.embeddings + self.unquantized

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.packed + other.packed, self.embeddings + other.embeddings, self.unquantized + other.unquantized
        )


def weights(model: Any) -> Weights:
    """Sum of the parameters and buffers of a model, by part."""
    return weights_of(model.modules(), model.get_input_embeddings())


def weights_of(modules: Iterable[Any], embedding: Any) -> Weights:
    """The same of some of a model's modules; embedding: its input embedding, whether it is among them or not."""
    from ..runtime import QuantLinear

    counted: set[int] = set()
    sums = {"packed": 0, "embeddings": 0, "unquantized": 0}
    # The embedding first: a tied head then counts as its part.
    for module in sorted(modules, key=lambda module: module is not embedding):
        part = "packed" if isinstance(module, QuantLinear) else "embeddings" if module is embedding else "unquantized"
        held = module.tensors() if isinstance(module, QuantLinear) else module.buffers(recurse=False)
        for tensor in [*module.parameters(recurse=False), *held]:
            if not tensor.is_meta and tensor.numel() and tensor.untyped_storage().data_ptr() not in counted:
                counted.add(tensor.untyped_storage().data_ptr())
                sums[part] += tensor.nbytes
    return Weights(**sums)


def read_per_token(model: Any) -> int:
    """Bytes of weights that one decode step reads: all, less an input embedding that only is looked up; of experts
    those that one token is given to, since sequences that are measured together are the same."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding
    read = weights(model).total - (0 if tied else embedding.nbytes)
    experts = sum(_held(module) for name, module in model.named_modules() if _EXPERT.search(name))
    if not experts:
        return read
    arch = architecture(model.config.to_dict())
    chosen = next(m for layer in arch.layers for m in layer.matrices if m.role == "expert")
    return read - experts + round(experts * chosen.active / chosen.count)


def _held(module: Any) -> int:
    from ..runtime import QuantLinear

    held = module.tensors() if isinstance(module, QuantLinear) else module.buffers(recurse=False)
    return sum(tensor.nbytes for tensor in [*module.parameters(recurse=False), *held])


def cache_bytes(cache: Any) -> int:
    """Bytes of the key and value tensors that a transformers cache holds."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.nbytes for t in tensors if t is not None)


@contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], tuple[int, str]]]:
    """Watches memory in use: the yielded function gives (bytes at the peak above those at the start, how seen)."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - start, "torch.cuda.max_memory_allocated")
        return
    before = process.resident()
    if process.reset_peak():
        yield lambda: (max(0, (process.peak_resident() or 0) - before), "peak resident memory of the process (VmHWM)")
        return
    seen = [before]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            seen[0] = max(seen[0], process.resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: (max(0, seen[0] - before), "resident memory of the process, sampled every 5 ms")
    finally:
        stop.set()
        thread.join()
