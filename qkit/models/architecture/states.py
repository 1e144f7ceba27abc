"""What keeps a state in place of attention, which keeps tokens: Mamba, linear attention, convolutions, RWKV."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ...spec.dtypes import named_dtype
from .keys import Keys
from .part import Part, Place, linears
from .types import Cache, Matrix

if TYPE_CHECKING:
    from .family import Family


def convolution(channels: int, kernel: int) -> Cache:
    """What a causal convolution keeps: engines the inputs before the newest, transformers that one too."""
    return Cache("state", fixed=channels * max(0, kernel - 1), wide=channels * kernel)


def recurrent(values: int, dtype: str | None = None, wide_dtype: str | None = "F32") -> Cache:
    """A state that transformers computes, and so keeps, in float32."""
    return Cache("state", fixed=values, fixed_dtype=dtype, wide=values, wide_dtype=wide_dtype)


def biased(k: Keys) -> bool:
    """Whether the projections into and out of a Mamba have biases; Nemotron-H has two keys, of which one counts."""
    return any(k.flag(key) for key in ("mamba_proj_bias", "use_bias", "add_bias_linear"))


def declared(k: Keys) -> str | None:
    """The type that a config asks engines to hold the state of its recurrence in."""
    named = k.get("mamba_ssm_cache_dtype") or k.get("mamba_ssm_dtype")
    return named_dtype(named) if isinstance(named, str) else None


def mamba1(k: Keys, f: Family, at: Place, module: str = "mixer", norms: bool = False) -> Part:
    """Mamba. norms: of the time step and of B and C (Jamba)."""
    stem, hidden = f"{at.layer}.{module}", k.size("hidden_size")
    inner = int(k.number("mamba_expand", 2) * hidden)
    states, kernel = k.size("mamba_d_state"), k.size("mamba_d_conv")
    rank = k.get("mamba_dt_rank")
    rank = math.ceil(hidden / 16) if rank in (None, "auto") else k.size("mamba_dt_rank")
    bias = biased(k)
    part = linears(stem, "attention", ("in_proj", 2 * inner, hidden), ("out_proj", hidden, inner), bias=bias)
    part += linears(stem, "attention", ("x_proj", rank + 2 * states, inner))
    part += linears(stem, "attention", ("dt_proj", inner, rank), bias=True)
    small = inner * (kernel + k.flag("mamba_conv_bias", True)) + inner * states + inner
    small += rank + 2 * states if norms else 0
    return part + Part((), small, (convolution(inner, kernel), recurrent(inner * states, declared(k))))


def mamba2(k: Keys, f: Family, at: Place, module: str = "mamba", normed: bool | str = True) -> Part:
    """Mamba-2. normed: whether its output is normed, or the key that says so."""
    stem, hidden = f"{at.layer}.{module}", k.size("hidden_size")
    count, groups = k.size("mamba_n_heads", most=1 << 20), k.size("mamba_n_groups", 1)
    states, kernel = k.size("mamba_d_state"), k.size("mamba_d_conv")
    inner = k.size("mamba_d_ssm", 0, least=0)
    dim = k.get("mamba_d_head")
    if dim in (None, "auto"):
        inner = inner or int(k.number("mamba_expand", 2) * hidden)
        dim = inner // count
    else:
        dim = k.size("mamba_d_head")
    inner = count * dim
    mixed = inner + 2 * groups * states
    part = linears(
        stem,
        "attention",
        ("in_proj", inner + mixed + count, hidden),
        ("out_proj", hidden, inner),
        bias=biased(k),
    )
    small = mixed * (kernel + k.flag("mamba_conv_bias", True)) + 3 * count + (inner if k.flag(normed) else 0)
    return part + Part((), small, (convolution(mixed, kernel), recurrent(inner * states, declared(k))))


def delta(k: Keys, f: Family, at: Place, module: str = "linear_attn", apart: bool = False) -> Part:
    """Gated delta rule (Qwen3-Next). apart: a matrix for each of what in_proj makes (Qwen3.5)."""
    stem, hidden = f"{at.layer}.{module}", k.size("hidden_size")
    queries, values = k.size("linear_num_key_heads", most=1 << 20), k.size("linear_num_value_heads", most=1 << 20)
    k_dim, v_dim = k.size("linear_key_head_dim"), k.size("linear_value_head_dim")
    kernel = k.size("linear_conv_kernel_dim")
    keys, out = queries * k_dim, values * v_dim
    mixed = 2 * keys + out
    made = {"in_proj_qkvz": mixed + out, "in_proj_ba": 2 * values}
    if apart:
        made = {"in_proj_qkv": mixed, "in_proj_z": out, "in_proj_b": values, "in_proj_a": values}
    part = linears(stem, "attention", *((name, n, hidden) for name, n in made.items()), ("out_proj", hidden, out))
    state = recurrent(values * k_dim * v_dim, declared(k))
    return part + Part((), mixed * kernel + 2 * values + v_dim, (convolution(mixed, kernel), state))


def kimi(k: Keys, f: Family, at: Place) -> Part:
    """Kimi Delta Attention: a gate for each channel."""
    stem, hidden = f"{at.layer}.self_attn", k.size("hidden_size")
    own = k.nested("linear_attn_config")
    count = own.size("num_heads", k.size("linear_num_heads", 32), most=1 << 20)
    dim = own.size("head_dim", k.size("linear_head_dim", 128))
    kernel = own.size("short_conv_kernel_size", k.size("linear_conv_kernel_dim", 4))
    wide = count * dim
    part = linears(stem, "attention", *((f"{name}_proj", wide, hidden) for name in "qkv"))
    part += linears(stem, "attention", ("f_a_proj", dim, hidden), ("f_b_proj", wide, dim), ("b_proj", count, hidden))
    part += linears(stem, "attention", ("g_a_proj", dim, hidden), ("g_b_proj", wide, dim), ("o_proj", hidden, wide))
    small = 3 * wide * kernel + wide + count + dim
    return part + Part((), small, (convolution(3 * wide, kernel), recurrent(wide * dim, "F32")))


def lightning(k: Keys, f: Family, at: Place) -> Part:
    """MiniMax-01's linear attention."""
    from .attention import head_dim

    stem, hidden = f"{at.layer}.self_attn", k.size("hidden_size")
    count, dim = k.size("num_attention_heads", most=1 << 20), head_dim(k)
    wide = count * dim
    part = linears(stem, "attention", ("qkv_proj", 3 * wide, hidden), ("out_proj", hidden, wide))
    part += linears(stem, "attention", ("output_gate", wide, hidden))
    return part + Part((), wide, (recurrent(wide * dim, None, None),))


def short(k: Keys, f: Family, at: Place) -> Part:
    """LFM2's gated convolution."""
    stem, hidden, kernel = f"{at.layer}.conv", k.size("hidden_size"), k.size("conv_L_cache")
    bias = k.flag("conv_bias")
    part = linears(stem, "attention", ("in_proj", 3 * hidden, hidden), ("out_proj", hidden, hidden), bias=bias)
    return part + Part((), hidden * (kernel + bias), (convolution(hidden, kernel),))


def gated_recurrence(k: Keys, f: Family, at: Place) -> Part:
    """RecurrentGemma's RG-LRU."""
    stem, hidden = f"{at.layer}.temporal_block", k.size("hidden_size")
    width, kernel = k.size("lru_width", hidden), k.size("conv1d_width")
    count = k.size("num_attention_heads", most=1 << 20)
    block = width // count
    part = linears(stem, "attention", ("linear_y", width, hidden), ("linear_x", width, hidden), bias=True)
    part += linears(stem, "attention", ("linear_out", hidden, width), bias=True)
    gates = tuple(
        Matrix(f"{stem}.rg_lru.{name}_gate_weight", block, block, "other", count, count)
        for name in ("input", "recurrent")
    )
    small = width * (kernel + 1) + width + 2 * width
    return part + Part(gates, small, (recurrent(width * (kernel - 1), None, None), recurrent(width, "F32")))


def rwkv(k: Keys, f: Family, at: Place) -> Part:
    """RWKV-4: the whole block, time mixing and channel mixing."""
    stem, hidden = at.layer, k.size("hidden_size")
    own = k.size("attention_hidden_size", hidden)
    wide = k.size("intermediate_size", 4 * hidden)
    names = ("key", "value", "receptance")
    part = linears(f"{stem}.attention", "attention", *((name, own, hidden) for name in names), ("output", hidden, own))
    block = f"{stem}.feed_forward"
    part += linears(block, "mlp", ("key", wide, hidden), ("receptance", hidden, hidden), ("value", hidden, wide))
    small = 2 * own + 5 * hidden + (4 if at.index == 0 else 2) * hidden  # a second norm, and one before the first block
    # Inputs of both mixings, and numerator, denominator and their scale.
    return part + Part((), small, (recurrent(2 * hidden, None, None), recurrent(3 * own, "F32")), wide=wide)


def beside(k: Keys, f: Family, at: Place) -> Part:
    """Falcon-H1: attention and Mamba-2 side by side."""
    from .attention import grouped

    full = Place(at.layer, at.index, "full_attention")
    return mamba2(k, f, at, normed="mamba_rms_norm") + grouped(k, f, full)


def shared(k: Keys, f: Family, at: Place) -> Part:
    """Zamba2's hybrid layer: a transformer block that several layers share, with adapters of each layer's own, before
    its Mamba. What another layer has in the files counts here as none that is multiplied with."""
    layers = [i for i, kind in enumerate(k.listed("layers_block_type") or ()) if kind == "hybrid"]
    nth = layers.index(at.index)
    blocks, rank = k.size("num_mem_blocks", 1), k.size("adapter_rank", 128)
    hidden = k.size("hidden_size")
    wide = k.size("intermediate_size", 4 * hidden)
    count = k.size("num_attention_heads", most=1 << 20)
    kv = k.size("num_key_value_heads", count, most=1 << 20)
    dim = 2 * hidden // count
    stem = f"{at.layer}.shared_transformer"
    part = linears(f"{stem}.self_attn", "attention", ("q_proj", count * dim, 2 * hidden))
    part += linears(f"{stem}.self_attn", "attention", *((n, kv * dim, 2 * hidden) for n in ("k_proj", "v_proj")))
    part += linears(f"{stem}.self_attn", "attention", ("o_proj", hidden, count * dim))
    part += linears(f"{stem}.feed_forward", "mlp", ("gate_up_proj", 2 * wide, hidden), ("down_proj", hidden, wide))
    if nth >= blocks:
        part = Part(tuple(Matrix(m.name, m.out, m.inp, m.role, 0) for m in part.matrices))
    else:
        part += Part((), 3 * hidden)
    if k.flag("use_shared_mlp_adapter", True):
        adapters = f"{stem}.feed_forward.gate_up_proj_adapter_list.{nth}"
        part += linears(adapters, "mlp", ("0", rank, hidden), ("1", 2 * wide, rank))
    if k.flag("use_shared_attention_adapter"):
        for name in "qkv":
            adapters = f"{stem}.self_attn.linear_{name}_adapter_list.{nth}"
            part += linears(adapters, "attention", ("0", rank, 2 * hidden), ("1", 2 * hidden, rank))
    part += linears(at.layer, "attention", ("linear", hidden, hidden))
    part += mamba2(k, f, at, module="mamba_decoder.mamba")
    cache = Cache("full", 2 * kv * dim, 2 * kv * dim, kv_heads=kv, head_dim=dim)
    return part + Part((), 0, (cache,), count, dim, dim, wide=wide)


Mixer = Callable[[Keys, "Family", Place], Part]


def named(mixer: Callable[..., Part], **given: object) -> Mixer:
    """A mixer with some of its arguments given."""
    return partial(mixer, **given)
