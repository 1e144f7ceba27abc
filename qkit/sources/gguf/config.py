"""config.json from GGUF metadata, in the keys of the original checkpoints on the Hub.

Keys: ggml/docs/gguf.md; their defaults: `llama_model::load_hparams` in llama.cpp. RoPE is written in the classic keys
(rope_theta, rope_scaling, rope_local_base_freq), which old and current readers both understand.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import QkitError
from ...spec.dtypes import torch_dtype


@dataclass(frozen=True)
class Arch:
    """One `general.architecture`: what transformers calls it, and what sets its tensors apart.

    permuted   the rows of Q and K are in ggml's RoPE order
    qk_norm    RMS norms on the heads of Q and K
    gemma      norms stored as weight + 1, two more norms per layer, sliding-window layers
    experts    "": dense; else the module that holds the router and the experts
    """

    model_type: str
    architecture: str
    permuted: bool = False
    qk_norm: bool = False
    gemma: bool = False
    experts: str = ""
    shared_expert: bool = False


ARCHS = {
    "llama": Arch("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Arch("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Arch("qwen3", "Qwen3ForCausalLM", qk_norm=True),
    "gemma3": Arch("gemma3_text", "Gemma3ForCausalLM", qk_norm=True, gemma=True),
    "qwen2moe": Arch("qwen2_moe", "Qwen2MoeForCausalLM", experts="mlp", shared_expert=True),
    "qwen3moe": Arch("qwen3_moe", "Qwen3MoeForCausalLM", qk_norm=True, experts="mlp"),
}
MISTRAL = Arch("mistral", "MistralForCausalLM", permuted=True)
MIXTRAL = Arch("mixtral", "MixtralForCausalLM", permuted=True, experts="block_sparse_moe")
_GEMMA_27B_LAYERS = 62
_MAX_COUNT = 1 << 14  # layers, experts: what a bogus number can make us list


class Keys:
    """Typed access to the metadata under `{architecture}.`; QkitError names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], arch: str, path: object):
        self.metadata, self.arch, self.path = metadata, arch, path

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `{arch}.{key}`, or `default`; per-layer arrays count where all layers agree."""
        name = f"{self.arch}.{key}"
        value = self.metadata.get(name, default)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            shown = "differs between layers" if isinstance(value, tuple) else f"is {str(value)[:50]!r}"
            raise QkitError(f"{self.path}: metadata {name} {shown}; qkit needs one {kind.__name__}")
        return shortest(value) if isinstance(value, float) else value

    def need(self, key: str, kind: type = int, limit: int = 1 << 31) -> Any:
        """The value, which must be there, above 0 and below `limit`."""
        value = self.get(key, kind)
        if value is None:
            raise QkitError(f"{self.path}: metadata {self.arch}.{key} is missing")
        if not 0 < value < limit:
            raise QkitError(f"{self.path}: metadata {self.arch}.{key} is {value}")
        return value


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.99999997e-07 was written as 1e-06."""
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", candidate) == struct.pack("<f", value):
                return candidate
        except OverflowError:
            break
    return value


def find_arch(metadata: Mapping[str, Any], path: object) -> tuple[str, Arch]:
    """The architecture's GGUF name and its record; raises QkitError listing the supported ones."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHS:
        raise QkitError(
            f"{path}: the architecture {str(name)[:60]!r} is not supported",
            f"supported in GGUF files: {', '.join(ARCHS)} (Mistral and Mixtral are stored as llama)",
        )
    if name == "llama" and metadata.get("llama.expert_count"):
        return name, MIXTRAL
    # A Mistral file is a llama one; only a sliding window makes a difference to the computation.
    if name == "llama" and metadata.get("llama.attention.sliding_window"):
        return name, MISTRAL
    return name, ARCHS[name]


def build_config(keys: Keys, arch: Arch, tensors: Mapping[str, Any], vocab_size: int, dtype: str) -> dict[str, Any]:
    """config.json, but for RoPE (`gguf_rope.rope_config`). Raises QkitError for missing or impossible metadata."""
    hidden, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    head_dim = keys.get("attention.key_length", int) or hidden // heads
    if keys.get("attention.value_length", int, head_dim) != head_dim:
        raise QkitError(f"{keys.path}: attention key and value heads of different sizes are not supported")
    kv_heads = keys.get("attention.head_count_kv", int, heads)
    if kv_heads < 1 or heads % kv_heads:
        raise QkitError(f"{keys.path}: {heads} attention heads do not divide into {kv_heads} key/value heads")
    rotary = keys.get("rope.dimension_count", int, head_dim)
    if rotary != head_dim or head_dim % 2:
        raise QkitError(f"{keys.path}: RoPE over {rotary} of {head_dim} dimensions is not supported")
    config: dict[str, Any] = {
        "architectures": [arch.architecture],
        "model_type": arch.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": keys.need("block_count", limit=_MAX_COUNT),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in tensors,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(torch_dtype(dtype)).removeprefix("torch."),
    }
    if not (arch.experts and arch.model_type != "mixtral"):
        config["intermediate_size"] = keys.need("feed_forward_length")
    config["hidden_activation" if arch.gemma else "hidden_act"] = "gelu_pytorch_tanh" if arch.gemma else "silu"
    if arch.model_type in ("llama", "qwen3", "qwen3_moe", "gemma3_text"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if arch.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if arch.model_type in ("mistral", "mixtral"):
        config["sliding_window"] = keys.get("attention.sliding_window", int) or None
    if arch.model_type.startswith("qwen"):
        config["use_sliding_window"] = False
    if arch.gemma:
        config |= _gemma3(keys, config)
    if arch.experts:
        config |= _experts(keys, arch)
    for name in ("bos", "eos", "padding"):
        token = keys.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int and 0 <= token < vocab_size:
            config[f"{'pad' if name == 'padding' else name}_token_id"] = token
    return config


def _gemma3(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """What gemma3 adds. Not stored in files, hence as llama.cpp has it: every sixth layer attends globally, and
    the 27B model scales its queries by hidden / heads instead of the head size."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    pattern = keys.metadata.get(f"{keys.arch}.attention.sliding_window_pattern", 6)
    if isinstance(pattern, tuple):
        sliding = [bool(flag) for flag in pattern]
    elif type(pattern) is int and pattern > 0:
        sliding = [bool((i + 1) % pattern) for i in range(layers)]
    else:
        sliding = []
    if len(sliding) != layers:
        raise QkitError(f"{keys.path}: attention.sliding_window_pattern does not describe {layers} layers")
    scalar = config["hidden_size"] // heads if layers == _GEMMA_27B_LAYERS else config["head_dim"]
    return {
        "sliding_window": keys.need("attention.sliding_window"),
        "layer_types": ["sliding_attention" if flag else "full_attention" for flag in sliding],
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", float),
        "final_logit_softcapping": keys.get("final_logit_softcapping", float),
    }


def _experts(keys: Keys, arch: Arch) -> dict[str, Any]:
    """Mixture-of-experts sizes. Routing weights are renormalized where llama.cpp does so: all but Qwen2-MoE."""
    count, used = keys.need("expert_count", limit=_MAX_COUNT), keys.need("expert_used_count")
    if used > count:
        raise QkitError(f"{keys.path}: {used} experts per token of {count}")
    if arch.model_type == "mixtral":
        return {"num_local_experts": count, "num_experts_per_tok": used}
    width = keys.need("expert_feed_forward_length")
    config = {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "intermediate_size": keys.get("feed_forward_length", int) or width,
        "norm_topk_prob": not arch.shared_expert,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if arch.shared_expert:
        config["shared_expert_intermediate_size"] = keys.need("expert_shared_feed_forward_length")
    return config
