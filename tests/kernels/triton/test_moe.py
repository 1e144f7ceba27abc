"""Grouped products of quantized experts in Triton's interpreter, against a loop over experts with the oracle."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from qkit.kernels import reference
from qkit.kernels.triton import layout, moe
from qkit.kernels.weight import Weight


def make(kind: str, out: int, in_: int, groups: int, zero: bool, seed: int) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out, in_), generator=generator, dtype=torch.uint8)
    if kind == "mxfp4":
        scale = torch.randint(118, 122, (out, groups), generator=generator, dtype=torch.uint8)
    else:
        scale = (torch.rand(out, groups, generator=generator) * 0.02 + 0.01).half()
    zeros = torch.randint(0, 16, (out, groups), generator=generator, dtype=torch.uint8) if zero else None
    return Weight(reference.pack(codes, 4), scale, zeros, 4, in_, kind)


def expected(x, ids, weights, gates, ups, downs):
    """Float32 throughout, but for the rounding of what lies between the two products."""
    y = torch.zeros(x.shape[0], downs[0].out_features)
    for e, (gate, up, down) in enumerate(zip(gates, ups, downs, strict=True)):
        g, u = (reference.matmul(x.float(), w) for w in (gate, up))
        part = reference.matmul((torch.nn.functional.silu(g) * u).to(x.dtype).float(), down)
        y += part * (weights * (ids == e)).sum(1, keepdim=True)
    return y


def pack(gates, ups, downs):
    gate_up = moe.stack([layout.prepack([g, u], paired=True) for g, u in zip(gates, ups, strict=True)])
    return gate_up, moe.stack([layout.prepack(w) for w in downs])


# float16 only: the interpreter does arithmetic on the bits of bfloat16.
CASES = [
    # kind, hidden, inner, groups of hidden and of inner, zero points, dtype, tokens, experts, top k
    ("int", 256, 128, 2, 1, False, torch.float16, 3, 4, 2),
    ("int", 160, 96, 5, 3, True, torch.float16, 6, 3, 2),
    ("mxfp4", 128, 64, 4, 2, False, torch.float16, 3, 4, 1),
]


@pytest.mark.parametrize(
    ("kind", "hidden", "inner", "groups", "down_groups", "zero", "dtype", "tokens", "n", "k"), CASES
)
def test_moe(kind, hidden, inner, groups, down_groups, zero, dtype, tokens, n, k):
    gates = [make(kind, inner, hidden, groups, zero, e) for e in range(n)]
    ups = [make(kind, inner, hidden, groups, zero, 100 + e) for e in range(n)]
    downs = [make(kind, hidden, inner, down_groups, zero, 200 + e) for e in range(n)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(tokens)])
    ids[ids == 1] = 0 if n == 4 else 1  # an expert without tokens, and a token that takes one expert twice
    weights = torch.rand(tokens, k, generator=generator)
    packed = pack(gates, ups, downs)
    got = moe.moe(x, ids, weights, *packed)
    exact = expected(x, ids, weights, gates, ups, downs)
    assert got.dtype == dtype and got.shape == exact.shape
    assert (got.float() - exact).norm() <= 2e-3 * exact.norm()
    assert torch.equal(moe.moe(x, ids.int(), weights, *packed), got)
    assert moe.moe(x[:0], ids[:0], weights[:0], *packed).shape == (0, hidden)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "block"), [(1, 8, 2, 16), (33, 4, 2, 16), (7, 128, 8, 16), (50, 2, 1, 32)]
)
def test_routing(tokens, experts, k, block):
    chosen = torch.randint(-1, experts + 1, (tokens, k), generator=torch.Generator().manual_seed(1))
    ids, expert_of = moe.route(chosen, experts, block)
    flat, seen = chosen.reshape(-1), []
    for places, expert in zip(ids.view(-1, block), expert_of, strict=True):
        pairs = places[places < flat.numel()].tolist()
        assert expert <= experts and (expert < experts or not pairs)
        assert all(flat[pair] == expert for pair in pairs) and pairs == sorted(pairs)
        seen += pairs
    assert sorted(seen) == [i for i, e in enumerate(flat.tolist()) if 0 <= e < experts]
    assert len(expert_of) == len(moe.route(torch.zeros_like(chosen), experts, block)[1])  # whatever the routing


def test_dropped_pairs_are_zero_and_ops_are_opaque():
    w = [make("int", 128, 64, 1, False, e) for e in range(2)]
    packed = moe.stack([layout.prepack(one) for one in w])
    ids, expert_of = moe.route(torch.tensor([[0], [5], [1]]), 2, 16)
    x = torch.randn(3, 64).half()
    y = moe.matmul(x, packed, ids, expert_of, 1, 3)
    assert not y[1].any() and y[0].any() and y[2].any()
    tensors = (packed.words, packed.scale, packed.zero, packed.row, packed.table)
    checks = ("test_schema", "test_faketensor")
    about = ("int", 4, 128, 64, packed.group_size, False, 1, 3)
    torch.library.opcheck(moe._matmul, (x, ids, expert_of, *tensors, *about), test_utils=checks)
    torch.library.opcheck(moe._combine_op, (y, torch.rand(3, 1)), test_utils=checks)


def test_wrong_inputs_are_refused():
    gates, downs = [make("int", 64, 128, 1, False, 0)], [make("int", 128, 64, 1, False, 1)]
    gate_up, down = pack(gates, gates, downs)
    x, ids, weights = torch.zeros(2, 128).half(), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    with pytest.raises(TypeError, match="float32"):
        moe.moe(x.float(), ids, weights, gate_up, down)
    with pytest.raises(ValueError, match=r"\(2, 127\).*\(2, 128\)"):
        moe.moe(x[:, 1:], ids, weights, gate_up, down)
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        moe.moe(x, ids, torch.ones(3, 1), gate_up, down)
    with pytest.raises(ValueError, match="not paired"):
        moe.moe(x, ids, weights, down, gate_up)
    with pytest.raises(ValueError, match="experts differ"):
        moe.stack([layout.prepack(gates[0]), layout.prepack(downs[0])])
