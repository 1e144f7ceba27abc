"""What the tensors of a checkpoint are, by their names and shapes: which are linears of a decoder block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import QkitError
from ..spec.dtypes import FLOATS, TensorMeta
from .config import text_config

# A decoder block's tensors carry its index after one of these words; everything else is left alone.
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d{1,9})\.")
# A part of a model that is not the text decoder: its name is the first group.
TOWERS = re.compile(r"(?:^|\.)((?:vision|visual|vit|audio|image|mm_|multi_modal|multimodal|speech)[a-z_]*)\.")
EMBEDDINGS = {"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embeddings", "tok_embeddings"}
_HEADS = {"lm_head", "output", "embed_out", "score"}
# `gate` alone is a MoE router (a gated MLP has gate_proj), and so is what lies inside one (gate.wg, router.layer).
# Routers are small, and every expert hangs on them.
_ROUTER = re.compile(r"(?:^|\.)(?:gate|shared_expert_gate|[a-z_]*router[a-z_]*)(?:\.|$)")

# Of an attention module: what keys and values are divided by before they are rounded to FP8 (`models.kv_cache`).
KV_SCALES = ("k_scale", "v_scale")
FUSED_EXPERTS = "fused 3-D experts"  # all experts of a matrix in one tensor
# Reasons for which matrices stay as they are in any model.
EXPECTED = ("embedding", "output head", "vision or audio tower", "router")


def module_of(name: str) -> str:
    """ "model.layers.0.mlp.up_proj.weight" -> "model.layers.0.mlp.up_proj"."""
    return name.rpartition(".")[0]


def check_blocks(config: Mapping[str, Any], names: Iterable[str], label: str) -> None:
    """Refuse a checkpoint of which decoder blocks are missing that its config speaks of."""
    expected = text_config(config).get("num_hidden_layers")
    found = {int(m[1]) for n in names if "vision" not in n and (m := BLOCK.search(n))}
    if not isinstance(expected, int) or not found:
        return
    # The first that are missing; a number that no model has is not counted up to.
    missing = [n for n in range(min(expected, len(found) + 6)) if n not in found]
    if missing:
        raise QkitError(
            f"{label}: config.json says {expected} decoder blocks, "
            f"but tensors of block {', '.join(map(str, missing[:5]))}{' ...' if len(missing) > 5 else ''} are missing",
            "the download may be incomplete: fetch the checkpoint again",
        )


def is_kv_scale(name: str) -> bool:
    """ "model.layers.0.self_attn.k_scale"; a quantized k_proj has its scales under another name."""
    module, _, kind = name.rpartition(".")
    return kind in KV_SCALES and module.endswith("attn")


def why_kept(name: str, meta: TensorMeta) -> str | None:
    """Why a tensor is not a decoder block's linear weight, or None where it is one."""
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    if (
        len(meta.shape) == 3 and min(meta.shape[1:]) >= 16 and BLOCK.search(name)
    ):  # the kernel of a convolution is small
        return FUSED_EXPERTS
    if is_kv_scale(name):
        return "KV cache scale"
    if kind != "weight" or len(meta.shape) < 2:
        return "bias or norm"
    if not meta.numel:
        return "empty"
    if last in EMBEDDINGS:
        return "embedding"
    if last in _HEADS:
        return "output head"
    if len(meta.shape) != 2:
        return f"{len(meta.shape)}-D, not a linear weight"
    if TOWERS.search(name):
        return "vision or audio tower"
    if not BLOCK.search(name):
        return "outside the decoder blocks"
    if _ROUTER.search(module):
        return "router"
    if "norm" in last:
        return "bias or norm"
    if meta.dtype not in FLOATS:
        return f"stored as {meta.dtype}"
    return None
