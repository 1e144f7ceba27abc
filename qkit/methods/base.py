"""What every quantization method offers: one file, one row of the table in `methods`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..kernels.weight import Weight
    from ..spec import LayerSpec

Shape = tuple[int, int]  # [out, in]


@dataclass(frozen=True)
class Quantized:
    """One weight, done.

    method        what was applied: the method's name, or "rtn" after a fallback
    squared       (||W - Wq||^2, ||W||^2), Frobenius; None where they were not computed on the way
    output_error  squared output error over squared output, on the calibration inputs; None without them, or where
                  float32 cannot hold it
    fallback      why it did not get the method, or None
    """

    weight: Weight
    method: str
    squared: tuple[float, float] | None = None
    output_error: float | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class Cost:
    """flops: multiply-adds count twice; nbytes: at the peak."""

    flops: float = 0.0
    nbytes: int = 0


class Method(Protocol):
    """A quantization method. A subclass says its `name`, and what of the rest differs from rounding a weight alone.

    needs    the statistic of a layer's inputs that it is given: a key of `calibrate.statistics.STATISTICS`; None: the
             weights are enough, and each tensor is a task of its own
    options  names of the conversion's options that are its own; `quantize` gets them as keyword arguments
    kinds    of weights that it makes (`LayerSpec.kind`)
    narrow   it makes integers of a narrow range (W8A8) too
    by_rows  rows of a weight come out the same without the others, but for what `whole` says
    observes the statistic is taken once, of the model as it is, for all weights, before any is quantized; else block by
             block, of what the quantized blocks before it make of the text. It may be None for a weight then
    prepares whether `prepare` is to be called, for which the block runs once more
    """

    name: ClassVar[str]
    needs: ClassVar[str | None] = None
    options: ClassVar[tuple[str, ...]] = ()
    prepares: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("int",)
    narrow: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    observes: ClassVar[bool] = False

    def check(self, spec: LayerSpec) -> str | None:
        """Why it cannot make weights of that kind, or None."""
        if spec.kind in self.kinds and (self.narrow or spec.kind != "int" or spec.grid.low is None):
            return None
        named = {"int": "integer weights", "ggml": "GGUF's block types"}
        made = " and ".join(named.get(kind, kind) for kind in self.kinds)
        return f"{self.name} makes {made}, not {spec.describe()}"

    def whole(self, spec: LayerSpec) -> bool:
        """Whether a weight of that kind is quantized with all its rows at once."""
        return not self.by_rows

    def prepare(
        self,
        block: nn.Module,
        read: Callable[[str], torch.Tensor],
        statistics: Mapping[tuple[str, ...], Any],
    ) -> Mapping[str, torch.Tensor]:
        """What is folded into neighbours before a decoder block is quantized: norms, and the linears behind them.

        block       as transformers builds it, with its weights
        read        (tensor name within the block) -> its values as the source has them
        statistics  names of linears that share an input -> the statistic of that input
        Returns tensor name within the block -> new values; they are written in place of the source's.
        """
        return {}

    def quantize(
        self, weights: Sequence[torch.Tensor], statistic: Any, specs: Sequence[LayerSpec], **options: Any
    ) -> list[Quantized]:
        """Quantize weights [out_i, in] that share an input, such as q, k and v.

        statistic: that of their input, None where `needs` is. Raises QkitError for what cannot be quantized."""
        ...

    def cost(self, shapes: Sequence[Shape], tokens: float) -> Cost:
        """Of quantizing weights that share an input, beside the weights themselves and the forward pass that brings
        the inputs. tokens: how many are observed."""
        return Cost()


class Divided(Method, Protocol):
    """A method that can be computed in parts, anywhere: `quantize` is `begin`, `solve` for each of `slabs`, and `join`
    for each weight, with the same bits."""

    def begin(self, statistic: Any, **options: Any) -> Any:
        """What all weights that share an input are solved with. The statistic may be used up."""
        ...

    def slabs(self, shapes: Sequence[Shape], specs: Sequence[LayerSpec]) -> list[list[tuple[int, int, int]]]:
        """Rows that are solved together, as (weight, first row, end); those of a weight in order."""
        ...

    def solve(self, rows: Sequence[torch.Tensor], begun: Any, spec: LayerSpec, **options: Any) -> list[Any]:
        """The parts of weights that are the rows of one slab, float [rows, in] each. Changes nothing of `begun`. Raises
        QkitError for what cannot be quantized."""
        ...

    def join(self, parts: Sequence[Any]) -> Quantized:
        """A weight, from the parts that `solve` made of it, in order."""
        ...


def divided(method: Method) -> Divided | None:
    """The method, where it can be computed in parts."""
    found: Any = method
    return found if all(hasattr(method, name) for name in ("begin", "slabs", "solve", "join")) else None
