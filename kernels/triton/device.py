"""What the kernels must know of a device, asked once each; and whether they can run there at all."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from typing import NamedTuple

import torch

from .. import reference

LEAST = (8, 0)  # compute capability
LEAST_TRITON = (3, 6)  # the oldest that is tried; older ones lack what the kernels are written in
_PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm")


class Card(NamedTuple):
    """name; processors: SMs or CUs; capability: CUDA's, (0, 0) elsewhere; amd; fp8: whether it multiplies e4m3."""

    name: str
    processors: int
    capability: tuple[int, int]
    amd: bool
    fp8: bool


INTERPRETER = Card("interpreter", 4, (0, 0), False, True)


def card(device: torch.device) -> Card:
    """The device's; a stand-in for Triton's interpreter, which computes on CPU tensors."""
    if device.type != "cuda":
        return INTERPRETER
    return _card(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache
def _card(index: int) -> Card:
    found = torch.cuda.get_device_properties(index)
    amd = torch.version.hip is not None
    capability = (0, 0) if amd else torch.cuda.get_device_capability(index)
    return Card(found.name, found.multi_processor_count, capability, amd, capability >= (8, 9))


def unavailable(device: torch.device) -> str | None:
    """None where Triton kernels can run on `device` here, else why not."""
    if device.type != "cuda":
        return f"runs on CUDA and ROCm devices, not on {device.type}"
    if reference.forced():
        return "QKIT_REFERENCE=1"
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST:  # bfloat16 products and asynchronous copies: Triton fails there with pages of PTX
            return f"needs compute capability {LEAST[0]}.{LEAST[1]}, this GPU has {capability[0]}.{capability[1]}"
    return _unusable()


@functools.cache
def _unusable() -> str | None:
    """None where a Triton is installed that the kernels are written for; found without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST_TRITON:
            return f"needs Triton {LEAST_TRITON[0]}.{LEAST_TRITON[1]} or later, this is {version}"
    return None
