"""The kernels as opaque operators: one graph, any number of rows, nothing leaked."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qkit.kernels import reference
from qkit.kernels.select import Weight, select
from qkit.methods import rtn
from qkit.runtime import opaque
from qkit.spec import integer


def made(out: int, in_: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    q = rtn.quantize(torch.randn(out, in_, generator=generator) / in_**0.5, integer(4, 32))
    return q


def prepared(weight: Weight, dtype: torch.dtype = torch.float32):
    kernel = select(weight, dtype)
    return kernel, kernel.prepack(weight, None)


@pytest.fixture
def handle():
    held = opaque.hold(*prepared(made(48, 64)))
    yield held
    opaque.release(held)


@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (2, 5, 64)])
def test_linear(shape, handle):
    x, bias = torch.randn(shape), torch.randn(48)
    exact = reference.matmul(x, made(48, 64), bias)
    torch.testing.assert_close(opaque.linear(x, handle, 48, bias), exact, atol=1e-4, rtol=1e-4)


def test_operators_follow_torchs_rules(handle):
    torch.library.opcheck(torch.ops.qkit.linear.default, (torch.randn(3, 64), handle, 48, None))
    torch.library.opcheck(torch.ops.qkit.linear.default, (torch.randn(3, 64), handle, 48, torch.randn(48)))


def test_layers_of_one_shape_share_a_graph():
    """The handle is an input, not a constant; nor does another number of rows make another graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    handles = [opaque.hold(*prepared(made(48, 64, seed))) for seed in range(3)]

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def run(x, handle):
        return opaque.linear(x * 2, handle, 48) + 1

    for seed, handle in enumerate(handles):
        for rows in (2, 7):
            x = torch.randn(rows, 64)
            exact = reference.matmul(x * 2, made(48, 64, seed)) + 1
            torch.testing.assert_close(run(x, handle), exact, atol=1e-4, rtol=1e-4)
        opaque.release(handle)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(dtype):
    count, tokens, hidden, wide, chosen = 5, 7, 64, 96, 2
    ups = [made(2 * wide, hidden, i) for i in range(count)]
    downs = [made(hidden, wide, 100 + i) for i in range(count)]
    handle = opaque.hold_experts([(prepared(u, dtype), prepared(d, dtype)) for u, d in zip(ups, downs, strict=True)])
    x = torch.randn(tokens, hidden).to(dtype)
    weights = torch.rand(tokens, chosen)
    ids = torch.stack([torch.randperm(count - 1)[:chosen] for _ in range(tokens)]).int()  # the last is never chosen
    exact = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for weight, number in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = reference.matmul(x[token].float(), ups[number]).chunk(2)
            exact[token] += weight * reference.matmul(F.silu(gate) * up, downs[number])
    got = opaque.experts(x, handle, weights, ids)
    assert got.dtype == dtype
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    assert float((got.float() - exact).norm() / exact.norm()) < bound
    opaque.release(handle)


def test_a_released_handle_is_an_error():
    handle = opaque.hold(*prepared(made(48, 64)))
    opaque.release(handle)
    with pytest.raises(KeyError):
        opaque.linear(torch.randn(1, 64), handle, 48)
    opaque.release(handle)  # twice is harmless
