"""gpt-oss' own checkpoints (quant_method "mxfp4"): the experts in e2m1 with a power of two per 32 inputs, all others as
they are.

A tensor holds a matrix of every expert, gate and up as one, their rows in turns: gate_up_proj_blocks U8 [experts, out,
in / 32, 16], two codes a byte, the first in the low nibble; gate_up_proj_scales U8 [experts, out, in / 32], E8M0.
Reference: transformers, integrations/mxfp4.py; modules_to_not_convert as in openai/gpt-oss-20b.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import QkitError
from ..models.config import text_config
from ..models.fused import GATE_UP
from ..spec import Keep, LayerSpec, mxfp4
from ..spec.dtypes import TensorMeta
from .base import Format, check_tensors

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight
    from ..sources.types import Source

_BLOCK = 32
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)(?:\.(bias))?$")
_KEPT = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Mxfp4(Format):
    """Experts are stacked; blocks and scales are local names after an underscore."""

    name: str = "mxfp4"
    quant_method: ClassVar[str | None] = "mxfp4"
    kinds: ClassVar[tuple[str, ...]] = ("mxfp4",)
    default_scheme: ClassVar[str] = "mxfp4a16"
    calibrated: ClassVar[str] = "rtn"
    joint: ClassVar[str] = "_"
    whole_experts: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True

    def bound(self, source: Source) -> Mxfp4:
        kind = text_config(source.config).get("model_type")
        if kind != "gpt_oss" or not any(f".{GATE_UP}." in name for name in source.names()):
            what = f"this is {kind}" if kind != "gpt_oss" else "here is one for each"
            raise QkitError(
                f"format mxfp4 is that of gpt-oss with a tensor for all experts; {what}",
                "mxfp4a16 in compressed-tensors and mxfp4 in gguf hold the same codes",
            )
        return self

    def place(self, name: str) -> str:
        match = _EXPERT.match(name)
        return name if match is None else f"{match[1]}.{match[2]}" + (f"_{match[3]}" if match[3] else "")

    def choose(
        self, choices: Mapping[str, LayerSpec | Keep], importance: bool, head: str | None = None
    ) -> tuple[Mapping[str, LayerSpec | Keep], list[str]]:
        """Only experts are quantized."""
        kept = Keep("no expert, which this format alone quantizes")
        others = [n for n, c in choices.items() if isinstance(c, LayerSpec) and not _EXPERT.match(n.rpartition(".")[0])]
        return {**choices, **dict.fromkeys(others, kept)}, []

    def scheme_for(self, scheme: LayerSpec, model_dtype: str) -> LayerSpec:
        return scheme

    def check(self, shape: tuple[int, int], scheme: LayerSpec) -> str | None:
        return f"groups of {_BLOCK} do not divide its {shape[1]} inputs" if shape[1] % _BLOCK else None

    def out_metas(self, shape: tuple[int, int], scheme: LayerSpec) -> dict[str, TensorMeta]:
        grid = (shape[0], shape[1] // _BLOCK)
        return {"blocks": TensorMeta("U8", (*grid, _BLOCK // 2)), "scales": TensorMeta("U8", grid)}

    def pack(self, weight: Weight, scheme: LayerSpec | None = None, of: int | None = None) -> dict[str, torch.Tensor]:
        import torch

        # Packed words hold eight codes, low bits first: as bytes they are what the format stores.
        blocks = weight.packed.contiguous().view(torch.uint8).view(weight.out_features, -1, _BLOCK // 2)
        return {"blocks": blocks, "scales": weight.scale}

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: LayerSpec, rows: int | None = None) -> Weight:
        import torch

        from ..kernels.weight import Weight

        blocks = tensors["blocks"]
        if blocks.dim() != 3:
            raise QkitError(f"blocks have shape {list(blocks.shape)}, not three dimensions")
        shape = (blocks.shape[0], blocks.shape[1] * _BLOCK)
        check_tensors(tensors, self.out_metas(shape, scheme))
        words = blocks.contiguous().view(shape[0], -1).view(torch.int32)
        return Weight(words, tensors["scales"], None, 4, shape[1], "mxfp4")

    def shape(self, source: Source, module: str, scheme: LayerSpec) -> tuple[int, int]:
        shape = source.meta(f"{module}.blocks").shape
        if len(shape) != 3:
            raise QkitError(f"tensor '{module}.blocks' has shape {list(shape)}, not three dimensions")
        return shape[0], shape[1] * _BLOCK

    def config(
        self, schemes: Mapping[str, LayerSpec], ignored: list[str], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(_KEPT)}

    def parse(self, quantization_config: Mapping[str, Any]) -> Mxfp4Reader:
        return Mxfp4Reader()


@dataclass(frozen=True)
class Mxfp4Reader:
    """For a source with one matrix per expert (sources/sliced.py). The tensors say which modules are quantized."""

    format: Mxfp4 = Mxfp4()
    markers: ClassVar[tuple[str, ...]] = ("blocks",)
    scale: ClassVar[str] = "scales"
    optional: ClassVar[tuple[str, ...]] = ()

    def scheme(self, module: str) -> LayerSpec:
        return mxfp4()

    def required(self, scheme: LayerSpec) -> tuple[str, ...]:
        return ("blocks", "scales")
