"""What is noted of each tensor while it is converted: errors, digests, what computed it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import QkitError

if TYPE_CHECKING:
    import torch

    from .tasks import Task


def computed_on(device: str) -> str:
    """What a calibrated result's last bits depend on: the order of sums changes with it ("cpu avx512, 2 threads")."""
    import torch

    from ..kernels import backend

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, kernels {backend()}, {torch.get_num_threads()} threads"


def record(task: Task, method: str, squared: tuple[float, float], **more: Any) -> dict[str, Any]:
    """The manifest's entry for a quantized weight. squared: (||W - Wq||^2, ||W||^2), Frobenius."""
    assert task.scheme is not None
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in more.items() if v is not None}
    return {
        "scheme": asdict(task.scheme),
        "method": method,
        "shape": list(task.meta.shape),
        "weight_error": float(f"{relative_error(squared):.6g}"),
        **rounded,
    }


def relative_error(squared: tuple[float, float]) -> float:
    """||W - Wq|| / ||W|| from their squares; 0 for a weight of zeros."""
    lost, total = squared
    return float((lost / total) ** 0.5) if total else 0.0


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises QkitError naming the tensor where it holds NaN or infinity."""
    from ..kernels import all_finite

    if tensor.is_floating_point() and tensor.itemsize > 1 and not all_finite(tensor):
        hint = "the checkpoint is damaged: fetch or train it again"
        raise QkitError(f"{name} contains NaN or infinite values", hint)


def digest_of(crc: int) -> str:
    """What tells whether a source tensor is still what it was when it was read ("crc32:0a1b2c3d"): the CRC-32 of its
    values as they are read, whatever file they lie in. Not a defence against forgery, which the hashes of the files
    are."""
    return f"crc32:{crc:08x}"
