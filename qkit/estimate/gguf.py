"""What a GGUF file of an architecture holds: llama.cpp's types, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

from ..formats.gguf import mixes
from ..models.architecture import Architecture, Matrix
from ..models.families import BLOCK
from ..spec.dtypes import ITEMSIZE
from ..spec.ggml import GGML

# The module of a matrix -> llama.cpp's word for it, on which the mixes look.
_KINDS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "out_proj": "attn_output",
    "dense": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "w1": "ffn_gate",
    "w3": "ffn_up", "w2": "ffn_down", "gate_up_proj": "ffn_up", "kv_b_proj": "attn_kv_b", "q_a_proj": "attn_q_a",
    "q_b_proj": "attn_q_b", "kv_a_proj_with_mqa": "attn_kv_a_mqa",
}  # fmt: skip


def tensors(arch: Architecture, mix: str | None, dtype: str, importance: bool) -> Iterator[tuple[Matrix, int, bool]]:
    """(matrix, its bytes, whether it is quantized); mix: None: as they are. Towers have files of their own, and
    routers are float32."""
    experts = next((m.count for layer in arch.layers for m in layer.matrices if m.role == "expert"), 0)
    heads = next((layer.attention_heads // c.kv_heads for layer in arch.layers for c in layer.caches if c.kv_heads), 1)
    facts = mixes.Facts(len(arch.layers), experts, heads, importance)
    for m in arch.matrices:
        if m.role in ("tower", "mtp"):
            continue
        if m.role == "router":
            yield m, m.numel * ITEMSIZE["F32"], False
        elif mix is None or m.role == "other":
            yield m, m.numel * ITEMSIZE[dtype], False
        else:
            block = mixes.fallback(mixes.wanted(mix, _name(m), m.inp, facts, arch.tied), m.inp)
            kind = GGML[block]
            yield m, m.out * kind.row_bytes(m.inp) * m.count, kind.plain is None


def _name(m: Matrix) -> str:
    if m.role == "embedding":
        return "token_embd.weight"
    if m.role == "head":
        return "output.weight"
    index = BLOCK.search(f"{m.name}.")
    kind = _KINDS.get(m.name.rpartition(".")[2], "ffn_up" if m.role in ("mlp", "expert", "shared") else "attn_q")
    kind += {"expert": "_exps", "shared": "_shexp"}.get(m.role, "")
    return f"blk.{index[1] if index else 0}.{kind}.weight"
