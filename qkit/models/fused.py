"""Checkpoints that hold the experts of a layer in one tensor, and the names of the matrices in it.

transformers 5 (save_original_format=False), Llama 4, Granite MoE and gpt-oss have such tensors; quantizers and engines
have one matrix per expert. Shapes: transformers' `*Experts` modules; gpt-oss' blocks: integrations/mxfp4.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..spec.dtypes import TensorMeta
from .config import text_config
from .families import BLOCK, TOWERS


@dataclass(frozen=True)
class Layout:
    """How one family has its experts.

    names        an expert's gate, up and down matrices
    attribute    the block within a decoder layer, to transformers' code; block: in the files, with one matrix each
    transposed   fused tensors are [experts, in, out]; interleaved: rows of gate and up take turns
    renamed      (pattern, replacement) for other names that differ between fused files and those with one matrix each
    """

    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    attribute: str = "mlp"
    block: str = "mlp"
    transposed: bool = False
    interleaved: bool = False
    renamed: tuple[str, str] | None = None


_MIXTRAL = Layout(("w1", "w3", "w2"), "mlp", "block_sparse_moe", renamed=(r"\.mlp\.", ".block_sparse_moe."))
_TRANSPOSED = Layout(transposed=True)
LAYOUTS: Mapping[str, Layout] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": Layout(),
    "qwen3_moe": Layout(),
    "granitemoe": Layout(
        attribute="block_sparse_moe",
        block="block_sparse_moe",
        renamed=(r"\.router\.weight$", ".router.layer.weight"),
    ),
    "llama4_text": Layout(attribute="feed_forward", block="feed_forward", transposed=True),
    "gpt_oss": Layout(transposed=True, interleaved=True),
    "qwen3_vl_moe": _TRANSPOSED,
    "qwen3_vl_moe_text": _TRANSPOSED,
    "llama4": _TRANSPOSED,
}
_FUSED = re.compile(
    r"^(?P<stem>.*\.experts)\.(?P<role>gate_up|down)_proj(?P<local>_bias|_blocks|_scales)?$"
    r"|^(?P<block>.*)\.(?P<linear>input|output)_linear\.weight$"
)
GATE_UP = "gate_up_proj"
_LOCAL = {None: "weight", "_bias": "bias", "_blocks": "blocks", "_scales": "scales"}
_DIMENSIONS = {"weight": 3, "bias": 2, "blocks": 4, "scales": 3}


@dataclass(frozen=True)
class Part:
    """One expert's share of a fused tensor. half: 0 gate, 1 up, None: all rows."""

    name: str
    expert: int
    half: int | None


@dataclass(frozen=True)
class Fused:
    """A tensor of all experts. stem: what the experts' names begin with; local: what it holds of each (weight, bias,
    blocks, scales); rows: outputs of an expert's matrix, gate and up together; whole: which a part is, too."""

    name: str
    stem: str
    local: str
    down: bool
    meta: TensorMeta
    layout: Layout
    transposed: bool
    whole: bool = False

    @property
    def rows(self) -> int:
        return self.meta.shape[2 if self.transposed else 1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each part."""
        rows = self.rows if self.down or self.whole else self.rows // 2
        return (rows, self.meta.shape[1]) if self.transposed else (rows, *self.meta.shape[2:])

    def parts(self) -> Iterator[Part]:
        gate, up, down = self.layout.names
        matrices = ((None, down),) if self.down else ((None, GATE_UP),) if self.whole else ((0, gate), (1, up))
        for expert in range(self.meta.shape[0]):
            for half, matrix in matrices:
                yield Part(f"{self.stem}.{expert}.{matrix}.{self.local}", expert, half)

    def of(self, half: int | None) -> slice:
        """The rows of a part."""
        if half is None:
            return slice(None)
        middle = self.rows // 2
        return slice(half, None, 2) if self.layout.interleaved else slice(half * middle, (half + 1) * middle)


def find_fused(metas: Mapping[str, TensorMeta], config: Mapping[str, Any], whole: bool = False) -> list[Fused]:
    """The tensors of a checkpoint that hold all experts of a decoder layer, in the layouts known here. whole: an
    expert's gate and up are one part."""
    text = text_config(config)
    layout = LAYOUTS.get(str(text.get("model_type")), LAYOUTS.get(str(config.get("model_type")), Layout()))
    hidden = text.get("hidden_size")
    found = []
    for name, meta in metas.items():
        match = _FUSED.match(name)
        if match is None or not BLOCK.search(name) or TOWERS.search(name):
            continue
        local = _LOCAL[match["local"]]
        if len(meta.shape) != _DIMENSIONS[local] or not meta.numel:
            continue
        down = match["role"] == "down" or match["linear"] == "output"
        transposed = _is_transposed(meta.shape, down, hidden, layout) if local == "weight" else False
        if transposed is None:
            continue
        stem = match["stem"] or f"{match['block']}.experts"
        fused = Fused(name, canonical(stem, layout), local, down, meta, layout, transposed, whole)
        if down or fused.rows % 2 == 0:
            found.append(fused)
    return found


def canonical(name: str, layout: Layout) -> str:
    """A name as files with one matrix per expert have it."""
    return name if layout.renamed is None else re.sub(*layout.renamed, name)


def _is_transposed(shape: tuple[int, ...], down: bool, hidden: Any, layout: Layout) -> bool | None:
    """Whether [experts, in, out]: the model's width decides, and the family where both sides have it. None: neither."""
    straight = shape[1 if down else 2] == hidden
    turned = shape[2 if down else 1] == hidden
    if straight and turned:
        return layout.transposed
    return turned if straight or turned else None
