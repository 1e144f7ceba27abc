"""Memory for tensors that are about to be filled."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..spec.dtypes import TensorMeta, torch_dtype

if TYPE_CHECKING:
    import torch

_HUGE_FROM = 4 << 20  # two huge pages: below that, malloc's reuse of freed memory is worth more


def empty(meta: TensorMeta) -> torch.Tensor:
    """An uninitialized contiguous CPU tensor. Raises QkitError where memory does not suffice.

    Large ones are asked for in huge pages. Filling fresh memory is otherwise dominated by one page fault per
    4 KiB: reading a cached file into them was measured at four to five times the bytes per CPU second.
    """
    import torch

    dtype = torch_dtype(meta.dtype)
    try:
        if meta.nbytes < _HUGE_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(meta.shape, dtype=dtype)
        block = mmap.mmap(-1, meta.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(block, dtype=dtype).view(meta.shape)  # the tensor keeps the block alive
    except (RuntimeError, OSError, MemoryError) as error:
        raise QkitError(
            f"no memory for a tensor of {meta.nbytes / 2**20:.0f} MiB", "close other programs, or use a larger machine"
        ) from error
