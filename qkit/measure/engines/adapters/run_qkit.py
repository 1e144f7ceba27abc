"""The sweep's adapter for models as `qkit.load` gives them (see sweep_worker.py)."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Engine:
    def __init__(self, settings: dict[str, Any]):
        import torch

        import qkit
        from qkit.models.config import max_positions
        from qkit.runtime import QuantLinear, load

        torch.set_num_threads(settings["threads"])
        self.model = load(settings["model"], device=settings["device"])
        self.version = f"qkit {qkit.__version__}"
        layers = [m for m in self.model.modules() if isinstance(m, QuantLinear)]
        self.settings = {
            "device": settings["device"],
            "threads": torch.get_num_threads() if self.model.device.type == "cpu" else None,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "kernels": dict(Counter(layer.select(self.model.dtype).name for layer in layers)),
        }
        self.max_context = max_positions(self.model.config.to_dict())
        if self.model.device.type == "cuda":
            self.reset_peak, self.peak = self._reset_peak, self._peak

    def run(self, prompts: list[list[int]], generated: int) -> tuple[float, list[float]]:
        from qkit.measure import speed

        first, rest, _ = speed.steps(self.model, self._ids(prompts), generated)
        return first, rest

    def generate(self, prompts: list[list[int]], generated: int) -> tuple[float, float]:
        from qkit.measure import speed

        return speed.generate(self.model, self._ids(prompts), generated)

    def _ids(self, prompts: list[list[int]]) -> Any:
        import torch

        return torch.tensor(prompts).to(self.model.device)

    def _reset_peak(self) -> bool:
        import torch

        torch.cuda.reset_peak_memory_stats(self.model.device)
        return True

    def _peak(self) -> int:
        import torch

        return int(torch.cuda.max_memory_allocated(self.model.device))
