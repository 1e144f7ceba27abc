"""Calibrated results, kept block by block so that an interrupted run loses at most one block's work.

A part is a safetensors file with one decoder block's packed weights and a JSON file with its records; the JSON
is written last, and a part without it does not count. The shards are later filled from the parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.families import BLOCK, module_of
from ..progress import say, track

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ..formats.base import Format
    from ..sources.types import Source
    from ..spec.scheme import QTensor
    from .plan import Plan, TensorPlan


class Parts:
    """Reads finished parts back; also the producer that fills the shards from them."""

    def __init__(self, folder: Path, plan: Plan, source: Source, fmt: Format):
        self.folder, self.source, self.fmt = folder, source, fmt
        self.blocks: dict[int, list[TensorPlan]] = {}
        for t in plan.tensors:
            if t.scheme is not None:
                self.blocks.setdefault(block_of(t.name), []).append(t)
        self._records: dict[int, dict[str, Any]] = {}

    def records(self, block: int) -> dict[str, Any] | None:
        """weight name -> manifest entry of a finished block, else None."""
        if block not in self._records:
            path = self.folder / f"block-{block:05d}.json"
            if not path.is_file():
                return None
            self._records[block] = json.loads(path.read_text("utf-8"))
        return self._records[block]

    def done(self, block: int) -> Mapping[str, QTensor] | None:
        """The QTensors of a finished block, for the forward pass of a resumed run."""
        if self.records(block) is None:
            return None
        result = {}
        for t in self.blocks.get(block, []):
            assert t.scheme is not None
            tensors = dict(zip(self._locals(t), self._read(block, t), strict=True))
            result[t.name] = self.fmt.unpack(tensors, t.scheme)
        return result

    def save(self, block: int, packed: Mapping[str, dict[str, torch.Tensor]], records: dict[str, Any]) -> None:
        """packed: weight name -> what the format made of it."""
        from ..storage.writer import write_file, write_safetensors

        entries, tensors = [], []
        for t in self.blocks[block]:
            entries += list(t.outputs)
            tensors += list(packed[t.name].values())
        write_safetensors(self.folder / f"block-{block:05d}.safetensors", entries, tensors)
        write_file(self.folder / f"block-{block:05d}.json", json.dumps(records, sort_keys=True).encode())
        self._records[block] = records

    def __call__(self, t: TensorPlan) -> tuple[list[torch.Tensor], dict[str, Any] | None]:
        from .run import check_finite

        if t.scheme is None:
            tensor = self.source.read(t.name)
            check_finite(t.name, tensor)
            return [tensor], None
        block = block_of(t.name)
        records = self.records(block)
        assert records is not None, f"block {block} was not quantized"
        return self._read(block, t), records[t.name]

    def _read(self, block: int, t: TensorPlan) -> list[torch.Tensor]:
        from ..storage.safetensors import SafetensorsFile

        part = SafetensorsFile(self.folder / f"block-{block:05d}.safetensors")
        return [part.read(name) for name, _ in t.outputs]

    def _locals(self, t: TensorPlan) -> list[str]:
        return [name.removeprefix(module_of(t.name) + ".") for name, _ in t.outputs]


def block_of(name: str) -> int:
    match = BLOCK.search(name)
    assert match is not None, name
    return int(match[1])


def quantize_into_parts(
    plan: Plan, source: Source, fmt: Format, tokens: torch.Tensor, folder: Path, device: str
) -> Parts:
    """Run the calibrated method over every decoder block; returns the producer for the shards."""
    from ..calibrate.blocks import quantize_blocks
    from .run import record

    parts = Parts(folder, plan, source, fmt)
    if all(parts.records(block) is not None for block in parts.blocks):
        return parts
    folder.mkdir(exist_ok=True)
    planned = {t.name: t for t in plan.tensors}
    with track(plan.method, len(parts.blocks), "blocks") as advance:
        for result in quantize_blocks(source, plan.schemes, tokens, device=device, done=parts.done):
            advance(1)
            if result.index not in parts.blocks or parts.records(result.index) is not None:
                continue
            packed, records = {}, {}
            for name, layer in result.layers.items():
                packed[name] = fmt.pack(layer.qtensor)
                if layer.fallback:
                    say(f"WARNING: {name} fell back to rounding: {layer.fallback}")
                records[name] = record(
                    planned[name],
                    layer.method,
                    weight_error(source.read(name), layer.qtensor),
                    output_error=layer.error,
                    fallback=layer.fallback,
                )
            parts.save(result.index, packed, records)
    return parts


def weight_error(weight: torch.Tensor, q: QTensor) -> float:
    """||W - Wq|| / ||W||, Frobenius, accumulated in float64."""
    w = weight.double()
    norm = float(w.norm())
    return float((w - q.dequantize().double()).norm()) / norm if norm else 0.0
