"""The weights of a checkpoint from its headers: every tensor's bytes under one class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..models.architecture.keys import Keys
from ..models.config import text_config
from ..models.families import BLOCK, EMBEDDINGS, TOWERS, module_of, why_kept
from ..spec.dtypes import TensorMeta
from .parts import Part, Weights

if TYPE_CHECKING:
    from ..sources.types import Source

# Local names of codes; what else a module with codes has, but for its bias, belongs to them.
CODES = ("weight_packed", "qweight", "weight", "blocks")
_CODED = ("U8", "I8", "F8_E4M3", "F8_E5M2", "I32")
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|\.conv\.|temporal_block|linear_attn|Attention")
_EXPERT = re.compile(r"\.experts(\.|$)|\.expert\.|_exps\.|block_sparse_moe\.(input|output)_linear")
_SHARED = re.compile(r"shared_expert|shared_mlp|_shexp")
_MTP = re.compile(r"(^|\.)mtp\.")
_FUSED = re.compile(r"(gate_up|down)_proj_(blocks|scales|bias)$")
# What llama.cpp calls them.
_GGUF = {"token_embd": "embedding", "output": "head", "per_layer_token_embd": "embedding", "output_norm": "norm"}


def of_source(source: Source) -> Weights:
    """See `weights.of_source`."""
    stored = getattr(source, "tensors", None)
    if stored is not None:  # a GGUF file: its own names and sizes, not those of the values in it
        sizes = {name: (info.nbytes, len(info.shape) > 1, info.type.plain is None) for name, info in stored.items()}
        names = set(sizes)
        tied = "output.weight" not in names
        classed = {name: _gguf_class(name, matrix) for name, (_, matrix, _) in sizes.items()}
        return _weights(source.config, {n: (classed[n], b, 0, q) for n, (b, _, q) in sizes.items()}, tied)
    metas = {name: source.meta(name) for name in source.names()}
    coded = {module_of(n) for n, m in metas.items() if n.rpartition(".")[2] in CODES and m.dtype in _CODED}
    layers = _layers(source.config)
    found: dict[str, tuple[str, int, int, bool]] = {}
    tied = True
    for name, meta in metas.items():
        module = _owner(name, coded)
        role = _class(name, meta, module, layers)
        tied = tied and role != "head"
        local = name[len(module) + 1 :] if module else name.rpartition(".")[2]
        fused = _FUSED.search(name)
        codes = (module is not None and local in CODES) or bool(fused and fused[2] == "blocks")
        scales = (module is not None and local not in (*CODES, "bias")) or bool(fused and fused[2] == "scales")
        found[name] = (role, 0 if scales else meta.nbytes, meta.nbytes if scales else 0, codes or scales)
    return _weights(source.config, found, tied)


def _weights(config: Mapping[str, Any], found: Mapping[str, tuple[str, int, int, bool]], tied: bool) -> Weights:
    count, active = _experts(config)
    parts = []
    for role, values, scales, quantized in found.values():
        if role == "expert":
            parts.append(Part(role, values, scales, count, active, quantized))
        else:
            looked_up = role in ("tower", "mtp") or (role == "embedding" and not tied)
            parts.append(Part(role, values, scales, 1, 0 if looked_up else 1, quantized))
    return Weights.of(parts)


def _owner(name: str, coded: set[str]) -> str | None:
    """The quantized module that a tensor belongs to; local names of some formats have dots."""
    at = name
    while (at := at.rpartition(".")[0]) and at.count(".") > name.count(".") - 4:
        if at in coded:
            return at
    return None


def _class(name: str, meta: TensorMeta, module: str | None, layers: int | None) -> str:
    """The class of a tensor. module: the quantized one that it belongs to."""
    block = BLOCK.search(name)
    if TOWERS.search(name):
        return "tower"
    if _MTP.search(name) or (block and layers is not None and int(block[1]) >= layers):
        return "mtp"
    if _EXPERT.search(name):
        return "expert"
    stem = module or module_of(name)
    # Whatever it is stored as, the module is judged as one that holds a plain matrix.
    bias = name.endswith(".bias") or (module is None and len(meta.shape) < 2)
    why = why_kept(f"{stem}.weight", TensorMeta("BF16", (16, 16) if not bias else (16,)))
    if module is None and not bias and len(meta.shape) != 2:
        why = why_kept(name, meta)
    last = stem.rpartition(".")[2]
    if last in EMBEDDINGS or why == "embedding":
        return "embedding"
    kinds = {"output head": "head", "router": "router", "bias or norm": "norm", "KV cache scale": "norm"}
    if why in kinds:
        return kinds[why]
    if why is not None:
        return "norm" if meta.numel <= 1 << 16 else "other"
    if _SHARED.search(name):
        return "shared"
    return "attention" if _ATTENTION.search(name) else "mlp"


def _gguf_class(name: str, matrix: bool) -> str:
    first, _, rest = name.partition(".")
    if first != "blk":
        return _GGUF.get(first, "norm" if not matrix else "other")
    kind = rest.partition(".")[2]
    if "_exps" in kind:
        return "expert"
    if "ffn_gate_inp" in kind:
        return "router"
    if not matrix:
        return "norm"
    if "_shexp" in kind:
        return "shared"
    return "mlp" if kind.startswith("ffn") else "attention"


def _layers(config: Mapping[str, Any]) -> int | None:
    try:
        return Keys(text_config(config), "").size("num_hidden_layers")
    except QkitError:
        return None


def _experts(config: Mapping[str, Any]) -> tuple[int, float]:
    """(experts of a layer, of them read by one token), (1, 1) where a config does not say."""
    text = text_config(config)
    k = Keys(text, str(text.get("model_type")))
    try:
        count = k.size("num_experts", 1, least=0)
        return max(1, count), k.size("num_experts_per_tok", max(1, count))
    except QkitError:
        return 1, 1
