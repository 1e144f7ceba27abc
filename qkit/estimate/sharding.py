"""Bytes of weights on the fullest of several devices, as each engine divides a model.

vLLM: tensor parallelism (model_executor/layers: linear.py, vocab_parallel_embedding.py; models/deepseek_v2.py for what
MLA replicates). llama.cpp: whole layers (--split-mode layer). transformers: whole layers (device_map="balanced").
"""

from __future__ import annotations

from dataclasses import dataclass

from ..models.architecture import Architecture, Matrix
from .parts import Weights

_VOCAB_PAD = 64  # vLLM pads tables of tokens to a multiple of these rows
_WIDTHS, _STREAM = 128, 256  # of experts in MXFP4
_REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa")  # down-projections of MLA: every rank has them whole


@dataclass(frozen=True)
class Held:
    """nbytes: on the fullest device; words: how they come about."""

    nbytes: int
    words: str


def held(arch: Architecture, weights: Weights, engine: str, devices: int, shared_memory: bool = False) -> Held:
    """Weights on the fullest of `devices`. shared_memory: CPU and GPU have one."""
    if engine == "vllm":
        return _vllm(arch, weights, devices)
    if engine == "llama.cpp":
        return _llama_cpp(arch, weights, devices, shared_memory)
    total = weights.total
    if devices == 1:
        return Held(total, "all tensors")
    body = total - weights.of_class("embedding", "head", "tower", "mtp")
    layer = -(-body // max(1, len(arch.layers)))
    return Held(-(-total // devices) + layer, f"1/{devices} of all tensors, to whole layers")


def _llama_cpp(arch: Architecture, weights: Weights, devices: int, shared_memory: bool) -> Held:
    """The table of tokens is looked up by the CPU. A tied one is the head too, and then on the GPU as well."""
    head = weights.of_class("embedding") if arch.tied else weights.of_class("head")
    body = weights.total - weights.of_class("embedding", "head", "tower", "mtp")
    if shared_memory:
        return Held(weights.total - weights.of_class("tower", "mtp"), "all tensors of the text model")
    if devices == 1:
        return Held(body + head, "all tensors but the table of tokens, which the CPU holds")
    layers = max(1, len(arch.layers))
    most = -(-(layers + 1) // devices)  # the head counts as a layer, the last
    fullest = max(-(-body * most // layers), -(-body * (most - 1) // layers) + head)
    return Held(fullest, f"{most} of {layers} layers, or {most - 1} with the head; the CPU holds the table of tokens")


def _vllm(arch: Architecture, weights: Weights, tp: int) -> Held:
    divided = (weights.of_class("mlp", "expert", "shared", "tower") + padding(arch, weights, tp)) / tp
    attention = weights.of_class("attention") * attention_share(arch, tp)
    padded = -(-arch.vocab // _VOCAB_PAD) * _VOCAB_PAD / arch.vocab
    tables = weights.of_class("embedding", "head") * padded / tp
    whole = weights.of_class("norm", "router", "other")
    more, words = made(arch, tp, any(p.quantized for p in weights.parts if p.role == "attention"))
    text = (
        "all tensors" if tp == 1 else f"linears, experts and tables of tokens divided by {tp}, norms and routers whole"
    )
    return Held(-int(-(divided + attention + tables + whole + more) // 1), text + words)


def padding(arch: Architecture, weights: Weights, tp: int) -> int:
    """Bytes that vLLM adds to experts in MXFP4, over all ranks: Marlin wants a rank's width in 128s and the model's in
    256s (quantization/mxfp4.py, fused_moe/layer.py), which gpt-oss' 2,880 is not. Other kernels pad a little less."""
    experts = next((m for layer in arch.layers for m in layer.matrices if m.role == "expert"), None)
    coded = sum(p.nbytes for p in weights.parts if p.role == "expert" and p.quantized and p.values == 16 * p.scales)
    if experts is None or not coded:
        return 0
    width = experts.out if experts.inp == arch.hidden else experts.inp
    wide = tp * _up_to(-(-width // tp), _WIDTHS)
    return coded * wide * _up_to(arch.hidden, _STREAM) // (width * arch.hidden) - coded


def _up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def attention_share(arch: Architecture, tp: int) -> float:
    """The part of attention's linears that one rank holds."""
    if tp == 1:
        return 1.0
    total = rank = 0.0
    for layer in arch.layers:
        linears = [m for m in layer.matrices if m.role == "attention"]
        values = sum(m.numel for m in linears)
        whole = sum(m.numel for m in linears if m.name.rpartition(".")[2] in _REPLICATED)
        # Where there are fewer KV heads than ranks, several ranks hold the same one.
        kv = sum(c.per_token * (-(-c.kv_heads // tp) / c.kv_heads - 1 / tp) for c in layer.caches if c.kv_heads)
        total += values
        rank += (values - whole) / tp + whole + kv * arch.hidden
    return rank / total if total else 1.0


def made(arch: Architecture, tp: int, quantized: bool) -> tuple[int, str]:
    """(bytes of tensors that vLLM makes itself, in words): the table of rotations; of MLA the two halves of kv_b_proj
    that it decodes with, which are views of one that is not quantized."""
    rotated = next((layer.head_dim for layer in arch.layers if layer.head_dim), 0)
    up = [m for layer in arch.layers for m in layer.matrices if _up(m)]
    if up:
        rotated = next(c.per_token for layer in arch.layers for c in layer.caches if c.kind == "latent") - up[0].inp
    table = (arch.max_tokens or 0) * rotated * 2
    twice = sum(m.numel for m in up) * 2 // tp if quantized else 0
    words = f"; {table:,} bytes of rotations" if table else ""
    return table + twice, words + (f"; {twice:,} bytes of kv_b_proj a second time, at 16 bits" if twice else "")


def _up(m: Matrix) -> bool:
    return m.name.endswith(".kv_b_proj")
