"""Mixture of experts with quantized weights: tokens sorted by expert, one launch per product for all experts.

Gate and up in one product whose epilogue is SiLU(gate) * up, then down, then the weighted sum of each token's experts.
Everything is done in a fixed order and no size depends on the routing, so results repeat bit by bit and a captured
graph replays for any routing. The weight layout is `layout.Packed`'s with a leading dimension for the expert.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .decode import factor, plane, scale_value, twice, zero_pair
from .gemm import epilogue
from .layout import Packed


@triton.jit
def _experts(
    x, words, scale, zero, row, table, ids, expert_of, y, TOTAL, N, K, PADDED_N, STRIDE_X, EXPERTS, GROUPS,
    KIND: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    EVEN_K: tl.constexpr, PAIRED: tl.constexpr, ASM: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Rows ids[...] // TOP_K of x times the weight of their block's expert -> rows ids[...] of y.

    The sums of a group are scaled, not the weights: experts see few tokens each.
    """
    expert = tl.load(expert_of + tl.program_id(1)).to(tl.int64)
    if expert < EXPERTS:
        DTYPE: tl.constexpr = x.dtype.element_ty
        PLANE: tl.constexpr = 2 * WORDS
        PLANES: tl.constexpr = 16 // BITS
        BLOCK: tl.constexpr = PLANE * PLANES
        SMALL: tl.constexpr = KIND == "mxfp4" or KIND == "nvfp4" or KIND == "fp8"
        UNDO: tl.constexpr = SMALL and DTYPE == tl.bfloat16  # as `gemm.gemm_kernel` does
        UP: tl.constexpr = factor(KIND, DTYPE)
        LATE: tl.constexpr = UP if SMALL and not UNDO else 1.0
        BY_BLOCK: tl.constexpr = GROUP > 0 and GROUP % BLOCK == 0

        rn = tl.program_id(0) * BN + tl.arange(0, BN)
        id = tl.load(ids + tl.program_id(1) * BM + tl.arange(0, BM))
        rp = tl.arange(0, PLANE)
        blocks = (K + BLOCK - 1) // BLOCK
        wp = words + expert * blocks * PADDED_N * WORDS + (rn[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
        # A place that no token fills reads the last token's row; it is not stored.
        xp = x + (tl.minimum(id, TOTAL - 1) // TOP_K).to(tl.int64)[:, None] * STRIDE_X + rp[None, :]
        if GROUP > 0:
            scale += expert * GROUPS * PADDED_N
        if ZERO:
            zero += expert * GROUPS * PADDED_N
        if KIND == "nf4" or KIND == "fp4":
            table += 0 if DTYPE == tl.float16 else 256

        acc = tl.zeros([BN, BM], tl.float32)
        for b in tl.range(0, blocks):
            w = tl.load(wp)
            z2 = 0
            s2 = twice(tl.full([1, 1], UP, tl.float32), DTYPE) if UNDO else tl.full([1, 1], 0, tl.int32)
            if ZERO and (BY_BLOCK or GROUP == 0):
                g = b // (GROUP // BLOCK) if GROUP > 0 else 0
                z2 = zero_pair(tl.load(zero + g * PADDED_N + rn)[:, None], BITS, DTYPE)
            if BY_BLOCK:
                s = scale_value(tl.load(scale + (b // (GROUP // BLOCK)) * PADDED_N + rn), KIND)[:, None]
                t = tl.zeros([BN, BM], tl.float32)
            for j in tl.static_range(PLANES):
                if EVEN_K:
                    xj = tl.load(xp + j * PLANE)
                else:
                    xj = tl.load(xp + j * PLANE, mask=(b * BLOCK + j * PLANE + rp < K)[None, :], other=0.0)
                if GROUP > 0 and not BY_BLOCK:
                    at = ((b * BLOCK + j * PLANE) // GROUP) * PADDED_N + rn
                    s = scale_value(tl.load(scale + at), KIND)[:, None]
                    if ZERO:
                        z2 = zero_pair(tl.load(zero + at)[:, None], BITS, DTYPE)
                v = plane(w, z2, s2, table, j, KIND, BITS, DTYPE, ZERO, UNDO, ASM)
                if BY_BLOCK:
                    t = tl.dot(v, tl.trans(xj), t)
                elif GROUP > 0:
                    acc += tl.dot(v, tl.trans(xj)) * s
                else:
                    acc = tl.dot(v, tl.trans(xj), acc)
            if BY_BLOCK:
                acc += t * s
            wp += PADDED_N * WORDS
            xp += BLOCK
        epilogue(acc, rn, id, row + expert * PADDED_N, row, y, TOTAL, N, LATE, False, PAIRED)


@triton.jit
def _combine(parts, weights, y, N, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """y[token] = sum over its experts, in the order of the router, of weights * parts."""
    token = tl.program_id(0).to(tl.int64)
    rn = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        part = tl.load(parts + (token * TOP_K + k) * N + rn, mask=rn < N, other=0.0)
        acc += part.to(tl.float32) * tl.load(weights + token * TOP_K + k).to(tl.float32)
    tl.store(y + token * N + rn, acc.to(y.dtype.element_ty), mask=rn < N)


@dataclass(frozen=True)
class Experts:
    """Experts' weights of one shape and kind: `layout.Packed` with a leading dimension [experts]; `table` is shared."""

    words: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    row: torch.Tensor
    table: torch.Tensor | None
    kind: str
    bits: int
    out_features: int
    in_features: int
    group_size: int
    paired: bool


def stack(packed: Sequence[Packed]) -> Experts:
    """One `Experts` of every expert's weight. Raises ValueError where they differ in kind or shape."""
    first = packed[0]
    about = [
        (p.kind, p.bits, p.out_features, p.in_features, p.group_size, p.paired, p.scale is None, p.zero is None)
        for p in packed
    ]
    if len(set(about)) > 1:
        raise ValueError(f"experts differ: {sorted(map(str, set(about)))}")
    return Experts(
        words=torch.stack([p.words for p in packed]),
        scale=None if first.scale is None else torch.stack([p.scale for p in packed if p.scale is not None]),
        zero=None if first.zero is None else torch.stack([p.zero for p in packed if p.zero is not None]),
        row=torch.stack([p.row for p in packed]),
        table=first.table,
        kind=first.kind,
        bits=first.bits,
        out_features=first.out_features,
        in_features=first.in_features,
        group_size=first.group_size,
        paired=first.paired,
    )


def route(expert_ids: torch.Tensor, experts: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts (token, choice) pairs by expert into blocks of one expert each; no value is read by the host.

    expert_ids  int [tokens, top_k], what the router chose
    Returns ids int32 [blocks * block_m], pairs as token * top_k + choice and tokens * top_k where a block is not full,
    and the expert of each block, int32 [blocks], `experts` for blocks that hold nothing. The number of blocks is the
    most that any routing can need. Pairs of an expert outside 0 .. experts-1 (another rank's) are dropped.
    """
    flat = expert_ids.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    total, device = flat.numel(), flat.device
    blocks = min(total, -(-total // block_m) + min(experts, total))
    count = torch.zeros(experts + 1, dtype=torch.long, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    full = (count + block_m - 1) // block_m  # blocks of each expert
    full[experts] = 0
    ends = full.cumsum(0)
    order = torch.argsort(flat, stable=True)
    expert = flat[order]
    rank = torch.arange(total, device=device) - (count.cumsum(0) - count)[expert]
    place = (ends - full)[expert] * block_m + rank
    place = torch.where(expert < experts, place, blocks * block_m)
    ids = torch.full((blocks * block_m + 1,), total, dtype=torch.int32, device=device)
    ids = ids.scatter(0, place, order.int())[:-1]  # the last place collects what is dropped
    block = torch.arange(blocks, device=device)
    expert_of = torch.searchsorted(ends[:experts].contiguous(), block, right=True)
    return ids, expert_of.int()


def block_rows(pairs: int, experts: int) -> int:
    """Rows of a block: about what an expert gets, 16 to 64."""
    return 16 if pairs <= 16 * experts else 32 if pairs <= 32 * experts else 64


@functools.lru_cache
def _card(index: int | None) -> tuple[int, int]:
    """CUDA's major compute capability, 0 on other devices, and the lanes of a warp."""
    if index is None:  # Triton's interpreter, on CPU tensors
        return 0, 32
    lanes = getattr(torch.cuda.get_device_properties(index), "warp_size", 32)
    return 0 if torch.version.hip else torch.cuda.get_device_capability(index)[0], lanes


def launch(
    x: torch.Tensor, w: Experts, ids: torch.Tensor, expert_of: torch.Tensor, top_k: int, total: int
) -> torch.Tensor:
    """`matmul`, its arguments checked and on the current device. Rows of dropped pairs are zero."""
    y = torch.zeros(total, w.out_features // 2 if w.paired else w.out_features, dtype=x.dtype, device=x.device)
    experts, _, padded_n, width = w.words.shape
    group, groups = (0, 0) if w.scale is None else (w.group_size, w.scale.shape[1])
    even = w.in_features % (32 * width // w.bits) == 0
    generation, lanes = _card(x.device.index if x.device.type == "cuda" else None)
    block_m = ids.shape[0] // expert_of.shape[0]
    # A scale for every plane takes registers: with 128 outputs sm_8x spills at four warps, and RDNA at any number.
    by_plane = group > 0 and group % (32 * width // w.bits) > 0
    narrow = lanes == 32 and generation < 9 and (generation == 0 or block_m == 16)
    block_n = 64 if by_plane and narrow else 128
    _experts[(padded_n // block_n, expert_of.shape[0])](
        x, w.words, w.scale, w.zero, w.row, w.table, ids, expert_of, y,
        total, w.out_features, w.in_features, padded_n, x.stride(0), experts, groups,
        w.kind, w.bits, width, group, w.zero is not None, even, w.paired, generation > 0, top_k, block_m, block_n,
        num_warps=4 if block_m == 16 else 8, num_stages=3,
    )  # fmt: skip
    return y


@torch.library.custom_op("qkit::moe_matmul", mutates_args=())
def _matmul(
    x: torch.Tensor,
    ids: torch.Tensor,
    expert_of: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row: torch.Tensor,
    table: torch.Tensor | None,
    kind: str,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    paired: bool,
    top_k: int,
    total: int,
) -> torch.Tensor:
    w = Experts(words, scale, zero, row, table, kind, bits, out_features, in_features, group_size, paired)
    with torch.cuda.device_of(x):
        return launch(x, w, ids, expert_of, top_k, total)


@_matmul.register_fake
def _(
    x: torch.Tensor,
    ids: torch.Tensor,
    expert_of: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row: torch.Tensor,
    table: torch.Tensor | None,
    kind: str,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    paired: bool,
    top_k: int,
    total: int,
) -> torch.Tensor:
    return x.new_empty(total, out_features // 2 if paired else out_features)


@torch.library.custom_op("qkit::moe_combine", mutates_args=())
def _combine_op(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """parts [tokens * top_k, n], weights [tokens, top_k] -> [tokens, n]."""
    (tokens, top_k), n = weights.shape, parts.shape[1]
    y = torch.empty(tokens, n, dtype=parts.dtype, device=parts.device)
    if tokens:
        with torch.cuda.device_of(parts):
            _combine[(tokens, triton.cdiv(n, 1024))](parts, weights, y, n, top_k, 1024, num_warps=4)
    return y


@_combine_op.register_fake
def _(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return parts.new_empty(weights.shape[0], parts.shape[1])


def matmul(
    x: torch.Tensor, w: Experts, ids: torch.Tensor, expert_of: torch.Tensor, top_k: int, total: int
) -> torch.Tensor:
    """Each pair's row of x times its expert's weight: [total, out], halved where the weights are paired.

    x [total / top_k, in], float16 or bfloat16; ids, expert_of: `route`. Raises TypeError and ValueError, with the
    values.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}, expected torch.float16 or torch.bfloat16")
    if x.dim() != 2 or x.shape[1] != w.in_features or x.shape[0] * top_k != total:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected {(total // top_k, w.in_features)} for {total} pairs of {top_k}"
        )
    if x.device != w.words.device or ids.device != w.words.device:
        raise ValueError(f"x is on {x.device}, the routing on {ids.device}, the weights on {w.words.device}")
    x = x if x.stride(1) == 1 else x.contiguous()
    tensors = (w.words, w.scale, w.zero, w.row, w.table)
    sizes = (w.kind, w.bits, w.out_features, w.in_features, w.group_size, w.paired)
    return _matmul(x, ids, expert_of, *tensors, *sizes, top_k, total)


def moe(
    x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, gate_up: Experts, down: Experts
) -> torch.Tensor:
    """sum_k expert_weights[t, k] * down_e(SiLU(gate_e(x_t)) * up_e(x_t)) with e = expert_ids[t, k]: [tokens, hidden].

    x [tokens, hidden], float16 or bfloat16; expert_ids and expert_weights [tokens, top_k]; gate_up: `paired` weights
    [2 * inner, hidden]; down: [hidden, inner]. Raises TypeError and ValueError, with the values.
    """
    if expert_ids.dim() != 2 or expert_ids.shape != expert_weights.shape or expert_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"experts {tuple(expert_ids.shape)} and their weights {tuple(expert_weights.shape)} do not fit "
            f"x {tuple(x.shape)}"
        )
    if (
        not gate_up.paired
        or gate_up.out_features != 2 * down.in_features
        or gate_up.words.shape[0] != down.words.shape[0]
    ):
        raise ValueError(
            f"gate_up is {gate_up.words.shape[0]} x {gate_up.out_features} x {gate_up.in_features} "
            f"({'paired' if gate_up.paired else 'not paired'}), "
            f"down {down.words.shape[0]} x {down.out_features} x {down.in_features}"
        )
    tokens, top_k = expert_ids.shape
    experts, total = down.words.shape[0], tokens * top_k
    if total == 0:
        return x.new_zeros(tokens, down.out_features)
    ids, expert_of = route(expert_ids, experts, block_rows(total, experts))
    inner = matmul(x, gate_up, ids, expert_of, top_k, total)
    return _combine_op(matmul(inner, down, ids, expert_of, 1, total), expert_weights.contiguous())
