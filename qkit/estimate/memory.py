"""Memory of a model in an engine, on one device: weights, KV cache, activations, logits, graphs, the engine's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import QkitError
from ..hardware.device import Target
from ..models.architecture import Architecture
from .overhead import Shape, Term, overhead, step
from .parts import Weights
from .sequence import Sequence
from .serving import Serving, check_engine
from .setting import Setting
from .sharding import Held, held

_LONG = 1 << 20  # tokens that stand for any context where only the step of a server is asked for


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    terms: tuple[Term, ...]

    @property
    def total(self) -> int:
        return sum(term.nbytes for term in self.terms)

    def of(self, name: str) -> int:
        return sum(term.nbytes for term in self.terms if term.name == name)

    def as_list(self) -> list[dict[str, Any]]:
        """JSON: a term each."""
        return [{"name": term.name, "bytes": term.nbytes, "basis": term.basis} for term in self.terms]


@dataclass(frozen=True)
class Sizes:
    """One model in one engine on so many devices: what its memory at any context and batch is computed from."""

    engine: str
    shape: Shape
    weights: Held
    sequence: Sequence
    kv_dtype: str
    split: float  # the part of the layers, and so of the cache, that is on the fullest device

    def kv_cache(self, context: int, batch: int) -> int:
        return int(-(-(self.sequence.nbytes(context) * batch * self.split) // 1))

    def total(self, target: Target, context: int, batch: int, serving: Serving) -> int:
        more = overhead(self.shape, target, self.engine, context, batch, serving)
        return self.weights.nbytes + self.kv_cache(context, batch) + sum(term.nbytes for term in more)

    def memory(self, target: Target, context: int, batch: int, serving: Serving) -> Memory:
        text = "formula: {} x {:,} bytes of a sequence of {:,} tokens in {}" + (
            ", {:.0%} of the layers" if self.split < 1 else ""
        )
        words = (batch, self.sequence.nbytes(context), context, self.kv_dtype, self.split)
        return Memory(
            (
                Term("weights", self.weights.nbytes, "formula: {}", (self.weights.words,)),
                Term("KV cache", self.kv_cache(context, batch), text, words),
                *overhead(self.shape, target, self.engine, context, batch, serving),
            )
        )


def default_kv_dtype(engine: str) -> str:
    return "F16" if engine == "llama.cpp" else "BF16"


def sizes(
    arch: Architecture, weights: Weights, target: Target, engine: str, kv_dtype: str | None = None,
    serving: Serving | None = None,
) -> Sizes:  # fmt: skip
    """What holds for all devices of a kind: only the number of devices, whether CPU and GPU share their memory, and the
    step of vLLM's scheduler come from the target."""
    check_engine(engine)
    s = serving or Serving()
    count = target.count
    tokens, _ = step(target, _LONG, 1, s)
    setting = Setting(tp=count if engine == "vllm" else 1, in_flight=tokens, ubatch=s.ubatch)
    shared = target.device.kind != "gpu"
    layers = max(1, len(arch.layers))
    split = 1.0 if engine == "vllm" else -(-layers // count) / layers
    dtype = kv_dtype or default_kv_dtype(engine)
    sequence = Sequence(arch, dtype, engine, setting)
    return Sizes(engine, Shape.of(arch), held(arch, weights, engine, count, shared), sequence, dtype, split)


def memory(
    arch: Architecture,
    weights: Weights,
    target: Target,
    engine: str,
    context: int,
    batch: int = 1,
    kv_dtype: str | None = None,
    serving: Serving | None = None,
) -> Memory:
    """What `batch` sequences of `context` tokens take on each of the target's devices (the fullest, where they differ).

    engine    "vllm" (tensor parallelism over the devices), "llama.cpp" or "transformers" (whole layers), "qkit"
    kv_dtype  a type of safetensors or ggml; None: 16 bits
    Raises QkitError for another engine or type, and for numbers below 1."""
    if min(context, batch) < 1:
        raise QkitError(f"context and batch are 1 or more, not {context} and {batch}")
    s = serving or Serving()
    return sizes(arch, weights, target, engine, kv_dtype, s).memory(target, context, batch, s)
