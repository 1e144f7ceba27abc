"""The check after writing: what is on the disk is what was planned, and dequantizes to what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import QkitError
from ..models.families import module_of
from ..progress import track

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..sources.types import Source
    from ..storage.manifest import Manifest
    from .plan import Plan

SAMPLES = 8  # weights measured again against the source: enough to catch a wrong layout, cheap enough to be default


def verify_result(plan: Plan, source: Source, fmt: Format, folder: Path, manifest: Manifest) -> None:
    """Raises QkitError unless every hash, every tensor's type and shape, and a sample of errors agree.

    The sampled weights are read back, unpacked, dequantized and compared with the source: their error must be
    the one noted while quantizing."""
    from ..sources.folder import FolderSource
    from .parts import weight_error

    with track("verifying", 1, "steps") as advance:
        problems = manifest.verify(folder)
        advance(1)
    if problems:
        raise QkitError(f"verification failed: {problems[0]}", "the disk may be failing; run again with --restart")
    written = FolderSource(folder)
    expected = {name: meta for t in plan.tensors for name, meta in t.outputs}
    for name, meta in expected.items():
        if written.meta(name) != meta:
            raise QkitError(f"verification failed: {name} is {written.meta(name)}, planned was {meta}")
    quantized = [t for t in plan.tensors if t.scheme is not None]
    step = max(1, len(quantized) // SAMPLES)
    for t in quantized[::step][:SAMPLES]:
        assert t.scheme is not None
        prefix = module_of(t.name) + "."
        tensors = {name.removeprefix(prefix): written.read(name) for name, _ in t.outputs}
        error = weight_error(source.read(t.name), fmt.unpack(tensors, t.scheme))
        noted = manifest.tensors[t.name]["weight_error"]
        if abs(error - noted) > 1e-4 * max(noted, 1e-3):
            raise QkitError(f"verification failed: {t.name} reads back with error {error:.6g}, noted was {noted:.6g}")
