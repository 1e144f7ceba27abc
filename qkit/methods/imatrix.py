"""Block types of GGUF, each error weighed by how large the input is that it meets: llama.cpp's importance matrix.

An error e in column j adds e^2 E[x_j^2] to the mean squared output error, inputs taken as independent. The means are
those of the original model on the calibration text (llama.cpp, tools/imatrix); what had no input there, such as an
embedding, is rounded without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..spec import LayerSpec
from .base import Method, Quantized
from .rtn import blocks

if TYPE_CHECKING:
    import torch


class Imatrix(Method):
    """Needs the mean squares of a layer's inputs."""

    name: ClassVar[str] = "imatrix"
    needs: ClassVar[str | None] = "moments"
    kinds: ClassVar[tuple[str, ...]] = ("ggml",)
    observes: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True

    def quantize(
        self, weights: Sequence[torch.Tensor], statistic: Any, specs: Sequence[LayerSpec], **options: Any
    ) -> list[Quantized]:
        reached = statistic is not None and bool(statistic.square.any())
        reason = None if reached or statistic is None else "no calibration token reached it"
        made = []
        for w, spec in zip(weights, specs, strict=True):
            packed, squared = blocks(w, spec, statistic.square if reached else None)
            made.append(Quantized(packed, self.name if reached else "rtn", squared, fallback=reason))
        return made
