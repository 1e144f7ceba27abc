"""Calibration of a decoder block in pieces that any process can compute, and that make up the same bits.

A text is divided into runs of whole batches. Each goes through the block by itself, stage by stage, as far as its
inputs (`Apart.inputs`). A Hessian is a sum in the order of the text: its rows are divided into pieces, and each piece
is handed from one part of the text to the next (`add`), so that many are under way at once; together they are what
one process has (`begin`). Then come slabs of rows of the weights (`Divided.solve`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..methods.square import mirror
from ..models import skeleton
from .block import Block, Layout
from .blocks import Decoder
from .statistics import Hessian, Inputs, row_panels

if TYPE_CHECKING:
    import torch

    from ..kernels.weight import Weight
    from ..methods.base import Divided
    from ..sources.types import Source
    from ..spec import LayerSpec
    from .block import Group

_SUM_BYTES = 64 << 20  # of a Hessian, or of several: what travels from one part of the text to the next


@dataclass(frozen=True)
class Rows:
    """Rows of the Hessian of a group's inputs."""

    group: Group
    first: int
    last: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return 4 * (self.last - self.first) * (self.in_features - self.first)


class Apart:
    """What a process keeps from piece to piece: the model, and one block with what was made of it so far."""

    def __init__(self, source: Source, schemes: Mapping[str, LayerSpec], shape: tuple[int, int], method: Divided):
        """schemes: weight name -> LayerSpec; shape: [samples, length] of the text."""
        import torch

        self.method = method
        samples, length = shape
        self.decoder = Decoder(source, schemes, length, "cpu", torch.bfloat16)
        size = min(samples, self.decoder.size)
        # What a block is called with besides states depends on the shapes of batches alone.
        self.decoder.embed(torch.zeros(size + samples % size, length, dtype=torch.int64))
        self._index: int | None = None
        self._put: set[str] = set()

    def layout(self, index: int, sample: torch.Tensor) -> Layout:
        return self._block(index).layout(sample)

    def inputs(
        self,
        index: int,
        layout: Layout,
        stage: int,
        states: Sequence[torch.Tensor],
        ready: Sequence[Mapping[str, Weight | torch.Tensor]],
    ) -> dict[Group, torch.Tensor]:
        """What each group of a stage is given of these batches, [tokens, in]. ready: what was made of the block so
        far."""
        block = self._block(index, ready)
        block.take(layout)
        block.see(stage, [group for group in layout.groups if group[1] == stage], states)
        return {group: seen.result() for group, seen in block.statistics.items()}

    def advance(
        self, index: int, states: Sequence[torch.Tensor], ready: Sequence[Mapping[str, Weight | torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The block's output."""
        self._block(index, ready)
        runner = self.decoder.runner(index)
        return [runner(each).to("cpu") for each in states]

    def _block(self, index: int, ready: Sequence[Mapping[str, Weight | torch.Tensor]] = ()) -> Block:
        """A block with exactly that put into it."""
        at = self.decoder.at(index)
        if self._index != index or not self._put <= {name for each in ready for name in each}:
            if self._index is not None:
                skeleton.dematerialize(self.decoder.blocks[self._index])
                self._index = None
            self.decoder.fill(at[:-1])
            self._index, self._put = index, set()
        for each in ready:
            self.decoder.put_back(index, {name: value for name, value in each.items() if name not in self._put})
            self._put |= set(each)
        runner, source, own = self.decoder.runner(index), self.decoder.source, self.decoder.own(index)
        return Block(runner, index, at, source, own, self.method, {}, kind=Inputs)


def sums(inputs: Mapping[Group, int]) -> Iterator[list[Rows]]:
    """What is summed up together of the Hessians of groups with so many input features: rows of one, or several."""
    pieces: list[Rows] = []
    for group, in_features in inputs.items():
        for first, last in row_panels(in_features):
            pieces.append(Rows(group, first, last, in_features))
            if sum(piece.nbytes for piece in pieces) >= _SUM_BYTES:
                yield pieces
                pieces = []
    if pieces:
        yield pieces


def add(
    pieces: Iterable[Rows], inputs: Mapping[Group, torch.Tensor], before: Mapping[Rows, Hessian] | None = None
) -> dict[Rows, Hessian]:
    """Rows of Hessians, with one part of the text more than `before`."""
    made = {}
    for piece in pieces:
        known = None if before is None else before[piece]
        made[piece] = known.copy() if known else Hessian(piece.in_features, "cpu", piece.first, piece.last)
        if piece.group in inputs:
            made[piece].add(inputs[piece.group])
        made[piece].trim()
    return made


def begin(
    method: Divided, group: Group, summed: Sequence[Mapping[Rows, Hessian]], options: Mapping[str, Any]
) -> tuple[Any, int]:
    """(what the weights of a group are solved with, tokens that reached them). summed: all rows of its Hessian."""
    import torch

    own = {piece: rows for each in summed for piece, rows in each.items() if piece.group == group}
    n = next(iter(own)).in_features
    hessian = torch.empty(n, n, dtype=torch.float32)
    for piece, rows in own.items():
        hessian[piece.first : piece.last, piece.first :] = rows.copy().rows()
    return method.begin(mirror(hessian), **options), next(iter(own.values())).tokens
