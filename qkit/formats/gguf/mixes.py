"""Which block type each tensor of a file gets: llama.cpp's mixes (src/llama-quant.cpp, `llama_tensor_get_type`)."""

from __future__ import annotations

from dataclasses import dataclass

from ...spec.ggml import GGML

# Name of the mix -> (its type for most tensors, number of the file type: enum llama_ftype).
MIXES: dict[str, tuple[str, int]] = {
    "q4_0": ("Q4_0", 2), "q4_1": ("Q4_1", 3), "q5_0": ("Q5_0", 8), "q5_1": ("Q5_1", 9), "q8_0": ("Q8_0", 7),
    "q2_k": ("Q2_K", 10), "q3_k_s": ("Q3_K", 11), "q3_k_m": ("Q3_K", 12), "q3_k_l": ("Q3_K", 13),
    "q4_k_s": ("Q4_K", 14), "q4_k_m": ("Q4_K", 15), "q5_k_s": ("Q5_K", 16), "q5_k_m": ("Q5_K", 17),
    "q6_k": ("Q6_K", 18), "iq4_nl": ("IQ4_NL", 25), "iq4_xs": ("IQ4_XS", 30),
    "mxfp4": ("MXFP4", 38), "mxfp4_moe": ("MXFP4", 38), "f16": ("F16", 1), "bf16": ("BF16", 32),
}  # fmt: skip
# What rows that no super-block of 256 divides get instead.
FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
_MORE = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")


@dataclass(frozen=True)
class Facts:
    """What of a model the mixes look at. importance: whether errors are weighed by one."""

    layers: int
    experts: int = 0
    heads_per_kv: int = 1
    importance: bool = False


def fits(block: str, columns: int) -> bool:
    """Whether blocks divide rows of so many values."""
    return columns % GGML[block].block_size == 0


def fallback(block: str, columns: int) -> str:
    """The type itself, or what takes its place where its blocks do not divide the rows; F16 where nothing does."""
    if fits(block, columns):
        return block
    other = FALLBACK.get(block, "F16")
    return other if fits(other, columns) else "F16"


def wanted(mix: str, name: str, columns: int, facts: Facts, tied: bool) -> str:
    """The type of a tensor that is quantized, before `fallback`. name: its GGUF name; tied: the embedding is the head
    too."""
    base = MIXES[mix][0]
    if base in ("F16", "BF16"):
        return base
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        if columns % 256:
            return "Q8_0"
        return "Q8_0" if base in ("Q8_0", "MXFP4") else "Q6_K"
    if name == "token_embd.weight":
        return "Q8_0" if base == "MXFP4" else base
    index, kind = int(name.split(".")[1]), name.split(".")[2]
    experts = facts.experts == 8
    if base == "MXFP4":  # llama.cpp has the second only: experts, of models that have some
        return base if mix == "mxfp4" or kind.endswith("_exps") else "Q8_0"
    if kind == "attn_v":
        return _value(mix, base, index, facts)
    if kind == "attn_k" and experts:
        return "Q8_0"
    if kind.startswith("ffn_down"):
        return _down(mix, base, index, facts)
    if kind == "attn_output":
        if experts and mix in _MORE:
            return "Q5_K"
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(mix, base)
    return base


def _more_bits(index: int, layers: int) -> bool:
    return index < layers // 8 or index >= 7 * layers // 8 or (index - layers // 8) % 3 == 2


def _value(mix: str, base: str, index: int, facts: Facts) -> str:
    if facts.experts == 8:  # small, and every expert hangs on it
        return "Q8_0"
    if mix == "q2_k":
        return "Q4_K" if facts.heads_per_kv >= 4 else "Q3_K"
    if mix == "q3_k_m":
        return "Q5_K" if index < 2 else "Q4_K"
    if mix == "q3_k_l" or (mix in ("iq4_nl", "iq4_xs") and facts.heads_per_kv >= 4):
        return "Q5_K"
    if mix in ("q4_k_m", "q5_k_m") and _more_bits(index, facts.layers):
        return "Q6_K"
    if mix == "q4_k_s" and index < 4:
        return "Q5_K"
    return base


def _down(mix: str, base: str, index: int, facts: Facts) -> str:
    n = facts.layers
    if mix == "q2_k":
        return "Q3_K"
    if mix == "q3_k_m":
        return "Q5_K" if index < n // 16 else "Q4_K"
    if mix == "q3_k_l":
        return "Q5_K"
    if mix in ("q4_k_m", "q5_k_m") and _more_bits(index, n):
        return "Q6_K"
    if index < n // 8:
        if mix == "q4_k_s" or (mix in ("iq4_nl", "iq4_xs") and not facts.importance):
            return "Q5_K"
        if mix in ("q4_0", "q5_0") and facts.importance:
            return {"q4_0": "Q4_1", "q5_0": "Q5_1"}[mix]
    return base
