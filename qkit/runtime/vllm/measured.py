"""Where our kernels were measured against vLLM's own, and what is left of a layer once its weights are prepacked."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...hardware.catalogue import profile_path

FILE = "vllm.csv"  # card, kernel, ratio (tokens/s of ours over vLLM's own), date, command; rows are only ever added
FASTER = 1.05  # below that the difference is noise, and vLLM's own stays first


def faster_on(card: str, kernel: str, path: Path | None = None) -> bool:
    """Whether the newest row for this card and kernel class says that ours is faster. No row, no claim; nor a file that
    is missing or cannot be read: an engine does not fail to start over it."""
    try:
        with open(path or profile_path(FILE), newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if (row["card"], row["kernel"]) == (card, kernel)]
        return bool(rows) and float(max(rows, key=lambda row: row["date"])["ratio"]) >= FASTER
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return False


def release(layer: Any, names: Iterable[str | None]) -> None:
    """Free parameters of a layer whose weight was prepacked. They stay, empty: vLLM's LoRA layers ask them for their
    device and type."""
    import torch

    for name in names:
        held = getattr(layer, name, None) if name is not None else None
        if held is not None:
            empty = torch.empty(0, dtype=held.dtype, device=held.device)
            setattr(layer, str(name), torch.nn.Parameter(empty, requires_grad=False))
