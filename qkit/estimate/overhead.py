"""What an engine holds beside weights and cache: activations, logits, CUDA graphs, its own libraries.

Each figure has its basis in words. Formulas were held against published logs: benchmarks/memory_check.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..hardware.device import Target
from ..models.architecture import Architecture
from .serving import Serving, batch_defaults

_MIB = 1 << 20
GRAPH_LAYER = 16 * _MIB
VLLM_OWN, VLLM_RANKS = 100 * _MIB, 200 * _MIB
CONTEXT = 450 * _MIB
_HOST = 300 * _MIB
PROCESS = 435 * _MIB
_SMALL = 2  # bytes of a value in 16 bits

_SAMPLED = (
    "formula: what {:,} sequences x {:,} tokens of the vocabulary x {} bytes take beyond the activations, when vLLM "
    "tries its sampler"
)
_GRAPHS = "published logs: 0.43 GiB at 28 layers, 0.64 at 40 (vLLM 0.11-0.26): 16 MiB a layer"
_BESIDE = (
    "published logs: 0.01-0.35 GiB beside torch's allocator on one device, 0.20-0.30 on several (vLLM 0.6-0.9); the "
    "driver's context and NCCL lie in the share that is left free"
)
_BATCH = "formula: {} tokens of a physical batch x {:,} values x 4 bytes, and a mask"
_OUTPUTS = "formula: what {} x {:,} tokens of the vocabulary x 4 bytes take beyond that (builds since 2026 hold fewer)"
_PROMPT = "formula: a prompt of {:,} tokens x {:,.0f} values x 2 bytes"
_LAST = "formula: the last position of {} sequences x {:,} tokens of the vocabulary x 10 bytes: in 16 bits, twice in 32"
_CONTEXT = "assumed: the driver's context and libraries"
_PROCESS = "assumed: a process with torch"
_PROCESS_TORCH = "measured: 429-443 MiB of Python, torch 2.13 and transformers 5.23 with a model on a CPU"


@dataclass(frozen=True)
class Term:
    """name: "weights", "KV cache", "activations", "logits", "CUDA graphs", "runtime". text, values: the basis, put
    together when it is read, because thousands of these are made and summed."""

    name: str
    nbytes: int
    text: str
    values: tuple[object, ...] = ()

    @property
    def basis(self) -> str:
        """Where the bytes come from: "formula: ...", "published logs: ...", "measured: ...", "assumed: ..."."""
        return self.text.format(*self.values)


@dataclass(frozen=True)
class Shape:
    """Widths that activations depend on. attention: values of a token around attention; chosen: experts of a token."""

    hidden: int
    mlp: int
    attention: int
    vocab: int
    heads: int
    layers: int
    chosen: float

    @classmethod
    def of(cls, arch: Architecture) -> Shape:
        attention = max((2 * x.attention_heads * (x.head_dim + x.v_dim) for x in arch.layers), default=0)
        chosen = max((m.active for x in arch.layers for m in x.matrices if m.role == "expert"), default=0)
        heads = max((x.attention_heads for x in arch.layers), default=0)
        return cls(arch.hidden, arch.intermediate, attention, arch.vocab, heads, len(arch.layers), chosen)


def overhead(shape: Shape, target: Target, engine: str, context: int, batch: int, s: Serving) -> tuple[Term, ...]:
    """All that is neither weights nor cache, on one device."""
    if engine == "vllm":
        return _vllm(shape, target, context, batch, s)
    if engine == "llama.cpp":
        return _llama_cpp(shape, target, context, batch, s)
    return _torch(shape, target, engine, context, batch)


def step(target: Target, context: int, batch: int, s: Serving) -> tuple[int, int]:
    """(tokens, sequences) of the step that vLLM profiles before it makes its cache."""
    tokens, sequences = batch_defaults(target.device, target.count)
    sequences = max(s.sequences or sequences, batch)
    tokens = s.batched_tokens or min(tokens, sequences * context)
    return tokens, min(sequences, tokens)


def _vllm(shape: Shape, target: Target, context: int, batch: int, s: Serving) -> tuple[Term, ...]:
    tokens, sequences = step(target, context, batch, s)
    tp = target.count
    # Gate, up and their product, with the stream, its norm and what comes of it; experts' outputs until they are added.
    mlp = 3 * shape.mlp / tp + 3 * shape.hidden + shape.chosen * shape.hidden
    wide = max(mlp, shape.attention / tp + 3 * shape.hidden)
    activations = math.ceil(tokens * wide * _SMALL)
    sampled = sequences * shape.vocab * s.sampler_bytes + tokens * shape.hidden * _SMALL
    parts = [
        Term("activations", activations, "formula: {:,} tokens of a step x {:,.0f} values x 2 bytes", (tokens, wide)),
        Term("logits", max(0, sampled - activations), _SAMPLED, (sequences, shape.vocab, s.sampler_bytes)),
    ]
    if target.device.kind == "cpu":
        return (*parts, Term("runtime", _HOST, _PROCESS))
    if s.graphs:
        parts.append(Term("CUDA graphs", shape.layers * GRAPH_LAYER, _GRAPHS))
    parts.append(Term("runtime", VLLM_OWN + (VLLM_RANKS if tp > 1 else 0), _BESIDE))
    return tuple(parts)


def _llama_cpp(shape: Shape, target: Target, context: int, batch: int, s: Serving) -> tuple[Term, ...]:
    tokens = min(s.ubatch, context * batch)
    cells = -(-context // 256) * 256
    logits = tokens * shape.vocab * 4
    wide = tokens * (2 * shape.mlp + 2 * shape.hidden) * 4
    mask = tokens * cells * _SMALL
    values: tuple[int, ...]
    text, values = _BATCH, (tokens, 2 * shape.mlp + 2 * shape.hidden)
    if not s.flash_attention:
        wide += shape.heads * tokens * cells * 4
        text, values = _BATCH + ", and the scores of {} heads with {:,} cells x 4 bytes", (*values, shape.heads, cells)
    own = 0 if target.device.kind == "cpu" or target.device.vendor == "Apple" else CONTEXT
    basis = "assumed: the driver's context, kernels and cuBLAS" if own else "none beside the process"
    return (
        Term("activations", wide + mask, text, values),
        Term("logits", max(0, logits + tokens * shape.hidden * 4 - wide - mask), _OUTPUTS, (tokens, shape.vocab)),
        Term("runtime", own, basis),
    )


def _torch(shape: Shape, target: Target, engine: str, context: int, batch: int) -> tuple[Term, ...]:
    tokens = context * batch
    wide = max(3 * shape.mlp + (3 + shape.chosen) * shape.hidden, shape.attention + 3 * shape.hidden)
    activations = math.ceil(tokens * wide * _SMALL)
    cuda = target.device.kind == "gpu"
    # On a CPU torch copies the head's weight once a sequence where it multiplies the last position of a prompt, unless
    # its input is laid out for it: runtime/head.py.
    copied = shape.hidden * _SMALL if target.device.kind == "cpu" and engine != "qkit" else 0
    logits = batch * shape.vocab * (_SMALL + 8 + copied)
    return (
        Term("activations", activations, _PROMPT, (tokens, wide)),
        Term("logits", logits, _LAST + (", and a copy of the head for each" if copied else ""), (batch, shape.vocab)),
        Term("runtime", CONTEXT, _CONTEXT) if cuda else Term("runtime", PROCESS, _PROCESS_TORCH),
    )
