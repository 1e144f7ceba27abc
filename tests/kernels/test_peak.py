"""What laying a weight out takes at most, beside the weight: a model is loaded with no more memory than it needs."""

from __future__ import annotations

import pytest
import torch
from allocated import most

from qkit.kernels import Weight, reference
from qkit.kernels.select import KERNELS
from qkit.kernels.triton import layer, quantized, restore

OUT, IN = 256, 2048


def made(bits: int, zeros: bool = False, kind: str = "int", group: int = 128) -> Weight:
    packed = torch.randint(-(2**31), 2**31 - 1, (OUT, IN * bits // 32), dtype=torch.int32)
    scale = torch.rand(OUT, IN // group)
    zero = torch.randint(0, 15, (OUT, IN // group), dtype=torch.uint8) if zeros else None
    return Weight(packed, scale, zero, bits, IN, kind)


@pytest.mark.parametrize(
    "bits, zeros, kind", [(4, False, "int"), (4, True, "int"), (8, False, "int"), (4, False, "nf4")]
)
def test_prepacking_takes_little_beside_the_weight(bits: int, zeros: bool, kind: str) -> None:
    weight = made(bits, zeros, kind)
    size = weight.packed.nbytes
    assert size <= most(layer, weight) <= 2.1 * size
    assert most(restore, layer(weight)) <= 5.2 * size
    cpu = next(kernel for kernel in KERNELS if kernel.name == "cpu")
    assert most(cpu.prepack, weight, None) <= 1.5 * size


def test_prepacking_for_int8_activations_takes_little_beside_the_weight() -> None:
    weight = made(8, group=IN)
    size = weight.packed.nbytes
    assert most(quantized.prepack, weight, "int8") <= 2.2 * size
    assert most(quantized.restore, quantized.prepack(weight, "int8")) <= 4.2 * size


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_takes_little_beside_the_codes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (OUT, IN), dtype=torch.uint8)
    packed = reference.pack(codes, bits)
    assert most(reference.pack, codes, bits) <= 3.2 * packed.nbytes
    assert most(reference.unpack, packed, bits, IN) <= codes.nbytes + 2.2 * packed.nbytes
