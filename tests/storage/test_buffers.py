"""Memory for tensors: right type and size whether it comes from malloc or in huge pages."""

from __future__ import annotations

import gc

import pytest
import torch

from qkit.errors import QkitError
from qkit.spec.dtypes import TensorMeta
from qkit.storage.buffers import empty


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("F32", ()),
        ("BF16", (0, 5)),
        ("U8", (3, 7)),
        ("BF16", (2049, 1025)),
        ("BOOL", (5 << 20,)),
        ("I64", (1 << 19, 1)),
    ],
)
def test_is_a_tensor_like_any_other(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = empty(TensorMeta(dtype, shape))
    assert tuple(tensor.shape) == shape and tensor.is_contiguous()
    tensor.fill_(1)
    row = tensor[-1:].clone() if shape and shape[0] else tensor
    view = tensor.view(-1)
    del tensor
    gc.collect()  # a view keeps the memory alive
    assert bool((view == 1).all()) and bool((row == 1).all())


def test_too_much_memory() -> None:
    with pytest.raises(QkitError, match="no memory"):
        empty(TensorMeta("U8", (1 << 60,)))


def test_tensors_do_not_share() -> None:
    a, b = (empty(TensorMeta("F32", (2 << 20,))) for _ in range(2))
    a.fill_(1)
    b.fill_(2)
    assert torch.equal(a, torch.ones(2 << 20))
