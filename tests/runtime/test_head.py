"""The output head on a CPU: the same product to the bit, of rows that torch multiplies without a copy of the weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import make_model
from torch import nn

from qkit.hardware import memory as process
from qkit.runtime import decoder, head, load


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_product_of_a_slice(dtype, rows, bias):
    plain = nn.Linear(48, 100, bias=bias).to(dtype)
    ours = copy.deepcopy(plain)
    ours.__class__ = head.Head
    states = torch.randn(rows, 9, 48).to(dtype)
    for x in (states, states[:, -1:], states[:, -3:], states[0], states[0, 0], states[:0]):
        assert ours(x).shape == plain(x).shape
        if not bias or dtype == torch.float32:
            assert torch.equal(ours(x), plain(x))
        exact = copy.deepcopy(plain).double()(x.double())
        assert (ours(x) - exact).norm() <= (plain(x) - exact).norm()
    states.requires_grad_()
    ours(states[:, -1:]).sum().backward()
    gradient, states.grad = states.grad, None
    plain(states[:, -1:]).sum().backward()
    torch.testing.assert_close(states.grad, gradient)


def test_no_copy_of_the_weight_is_made():
    """Of 64 MB, four times, which a plain linear makes."""
    if not process.reset_peak():
        pytest.skip("the peak of a process cannot be reset here")
    ours = nn.Linear(256, 1 << 17, bias=False).bfloat16()
    ours.__class__ = head.Head
    states = torch.randn(4, 512, 256).bfloat16()
    with torch.inference_mode():
        ours(states[:, -1:])
        process.reset_peak()
        before = process.resident()
        ours(states[:, -1:])
    assert process.peak_resident() - before < 32 << 20


def test_a_loaded_model_has_one_and_gives_it_back(tmp_path):
    folder = make_model(tmp_path)
    model = load(folder, device="cpu", dtype=torch.bfloat16)
    ids = torch.arange(12)[None]
    assert type(model.lm_head) is head.Head and isinstance(model.lm_head, nn.Linear)
    with torch.no_grad():
        first = model(ids, logits_to_keep=1).logits
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids, logits_to_keep=1).logits, first)
        decoder.detach(model)
        head.as_it_was(model)
        assert type(model.lm_head) is nn.Linear and torch.equal(model(ids, logits_to_keep=1).logits, first)
