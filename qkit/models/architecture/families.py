"""The families whose models are known here, each as its differences from Llama."""

from __future__ import annotations

from dataclasses import replace

from . import kinds
from .attention import latent
from .family import Family
from .mlp import Moe, after_first, between, interleaved, stepwise

_LLAMA = Family()
_QWEN2 = Family(qkv_bias=True, out_bias=False, mlp_bias=False, rule=kinds.upper)
_QWEN3 = Family(qk_norm="head", mlp_bias=False, rule=kinds.upper)
_GEMMA = Family(mlp_bias=False, tied=True)
_GEMMA2 = replace(_GEMMA, norms=4, rule=kinds.every(2))
_W = ("w1", "w3", "w2")
_QWEN_MOE = Moe(sparse=stepwise, width=("moe_intermediate_size",))
_DEEPSEEK = Moe(
    sparse=after_first, width=("moe_intermediate_size",), shared="shared_experts", correction=True,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, qkv_bias=False, mlp_bias=False),
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, qk_norm="head", rule=kinds.every(6)),
    "mixtral": Family(
        qkv_bias=False,
        moe=Moe("block_sparse_moe", _W, width=("intermediate_size",)),
    ),
    "qwen2_moe": replace(
        _QWEN2,
        qkv_bias="qkv_bias",
        rule=kinds.lower_odd,
        moe=replace(
            _QWEN_MOE, shared="shared_expert", shared_width="shared_expert_intermediate_size", shared_gate=True
        ),
    ),
    "qwen3_moe": replace(_QWEN3, rule=kinds.uniform, moe=_QWEN_MOE),
    "deepseek_v2": Family(mixer=latent, moe=replace(_DEEPSEEK, correction=False)),
    "deepseek_v3": Family(mixer=latent, mlp_bias=False, moe=_DEEPSEEK),
    "gpt_oss": Family(
        sinks=True,
        rule=kinds.every(2),
        moe=Moe(router="router", width=("intermediate_size",), bias=True),
    ),
    "llama4_text": Family(
        mlp="feed_forward",
        rule=kinds.rotated,
        moe=Moe(
            "feed_forward", router="router", sparse=interleaved, width=("intermediate_size",),
            shared="shared_expert", shared_width="intermediate_size",
        ),
    ),
    "ernie4_5_moe": Family(
        qkv_bias="use_bias",
        mlp_bias="use_bias",
        moe=replace(_DEEPSEEK, sparse=between, correction=True),
    ),
}  # fmt: skip
