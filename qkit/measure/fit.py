"""Whether a profile can run in the memory that is free: by formula, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .. import units
from ..errors import QkitError
from ..estimate import cache
from ..models.architecture import Architecture, architecture
from ..models.skeleton import check_architecture
from ..spec.dtypes import FLOATS, ITEMSIZE, named_dtype
from . import speed

if TYPE_CHECKING:
    from ..hardware.detect import LocalDevice
    from ..sources.types import Source


@dataclass(frozen=True)
class Sizes:
    """What decides a model's memory: its architecture, the type it runs in, bytes of its weights."""

    label: str
    arch: Architecture
    dtype: str
    weights: int

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def max_tokens(self) -> int | None:
        """The most that its config says it takes; None where it says nothing."""
        return self.arch.max_tokens

    def kv(self, tokens: int, batch: int) -> tuple[int, str]:
        """(bytes of the KV cache, the formula with its numbers)."""
        found = cache.kv(self.arch, tokens, batch, self.dtype, "qkit", cache.Setting(state_dtype=self.dtype))
        return found.total, found.formula

    def layer(self, tokens: int, batch: int) -> int:
        """Bytes that one MLP takes at the least while a prompt runs: its input and residual, gate, up, product."""
        return batch * tokens * self.itemsize * (2 * self.arch.hidden + 3 * self.arch.intermediate)

    def head(self, batch: int) -> int:
        """Bytes that the logits of the last position take while they are made.

        generate adds two float32 copies: one of its own, and one for a processor of scores."""
        return batch * self.arch.vocab * (self.itemsize + 2 * 4)


def sizes(source: Source) -> Sizes:
    """From config.json and the headers. Raises QkitError for an architecture that cannot run."""
    check_architecture(source.config)
    arch = architecture(source.config)
    dtype = named_dtype(source.config.get("dtype") or source.config.get("torch_dtype")) or "BF16"
    metas = [source.meta(name) for name in source.names()]
    # Plain tensors are cast to the type that the model runs in; codes and small floats stay as they are.
    weights = sum(m.numel * ITEMSIZE[dtype] if m.dtype in FLOATS else m.nbytes for m in metas)
    return Sizes(source.label, arch, dtype, weights)


@dataclass(frozen=True)
class Load:
    """Models that are loaded side by side: their weights, and of one at a time the KV cache of `batch` sequences of
    `context` tokens and what is generated after them, with the logits or a layer's activations; or of all of them the
    logits of chunks of n_ctx tokens, for scoring."""

    models: Sequence[Sizes]
    where: LocalDevice
    context: int
    batch: int
    n_ctx: int

    @property
    def weights(self) -> int:
        return sum(m.weights for m in self.models)

    @property
    def scoring(self) -> int:
        return sum(self.n_ctx * m.arch.vocab * m.itemsize for m in self.models)

    @property
    def cache(self) -> int:
        return max(m.kv(_length(m, self.context), self.batch)[0] for m in self.models)

    @property
    def passing(self) -> int:
        return max(max(m.head(self.batch), m.layer(self.context, self.batch)) for m in self.models)

    @property
    def scores(self) -> bool:
        """Whether there is room to score; speed may need more."""
        return self.weights + self.scoring <= self.where.available_bytes

    @property
    def fits(self) -> bool:
        return self.scores and self.weights + self.cache + self.passing <= self.where.available_bytes


def check(load: Load) -> bool:
    """Whether the models fit the free memory.

    Raises QkitError where they do at a smaller batch or context, naming the largest that fit."""
    if load.fits:
        return True
    remedies = [
        f"the largest {name} that fits {at} is {most}"
        for name, at, most in (
            (
                "--batch",
                f"at --context {load.context}",
                _largest(lambda n: replace(load, batch=n).fits, load.batch, 1),
            ),
            (
                "--context",
                f"at --batch {load.batch}",
                _largest(lambda n: replace(load, context=n).fits, load.context, 8),
            ),
        )
        if most
    ]
    if not remedies:
        return False
    names = " and ".join(m.label for m in load.models)
    raise QkitError(
        f"{names} at --batch {load.batch} and --context {load.context} needs {units.size(load.weights)} for weights, "
        f"{units.size(load.cache)} for the KV cache and {units.size(load.passing)} for logits and activations; "
        f"{load.where.id} has {units.size(load.where.available_bytes)} for it",
        "; ".join(remedies),
    )


def _length(model: Sizes, context: int) -> int:
    """Tokens in the cache at the end of a timed run."""
    length = context + speed.GENERATED
    return min(length, model.max_tokens) if model.max_tokens else length


def _largest(fits: Callable[[int], bool], too_many: int, least: int) -> int | None:
    """The largest n in [least, too_many) that fits, where every smaller one does too; None where there is none."""
    if least >= too_many or not fits(least):
        return None
    low, high = least, too_many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
