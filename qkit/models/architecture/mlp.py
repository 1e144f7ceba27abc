"""What a layer has beside its attention: an MLP, or experts with their router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...errors import QkitError
from .keys import Keys
from .part import Part, Place, linears
from .types import Matrix

if TYPE_CHECKING:
    from .family import Family

Sparse = Callable[[Keys, int], bool]


def after_first(k: Keys, index: int, dense: int = 0) -> bool:
    """DeepSeek's: the first layers are dense. dense: how many where the config does not say."""
    if k.get("mlp_layer_types") is not None:
        return _typed(k, index)
    return index >= k.size("first_k_dense_replace", dense, least=0)


def after_one(k: Keys, index: int) -> bool:
    return after_first(k, index, 1)


def stepwise(k: Keys, index: int) -> bool:
    """Qwen's: every step-th layer, but for those that are listed."""
    listed = k.listed("mlp_only_layers") or []
    return index not in listed and (index + 1) % k.size("decoder_sparse_step", 1) == 0


def interleaved(k: Keys, index: int) -> bool:
    """Llama 4's: those that are listed, or every step-th."""
    listed = k.listed("moe_layers")
    return index in listed if listed is not None else (index + 1) % k.size("interleave_moe_layer_step", 1) == 0


def between(k: Keys, index: int) -> bool:
    """ERNIE's: every interval-th layer from a first to a last; -1: the last of all."""
    if k.get("mlp_layer_types") is not None:
        return _typed(k, index)
    layers = k.size("num_hidden_layers")
    last = k.get("moe_layer_end_index")
    if last is None or last == -1:
        last = layers - 1
    first, step = k.size("moe_layer_start_index", 0, least=0), k.size("moe_layer_interval", 1)
    if not isinstance(last, int):
        raise QkitError(f"moe_layer_end_index in config.json is {last!r}, not a whole number", "check config.json")
    return (index + 1) % step == 0 and first <= index <= last


def periodic(k: Keys, index: int) -> bool:
    """Jamba's."""
    return index % k.size("expert_layer_period", 1) == k.size("expert_layer_offset", 0, least=0)


def _typed(k: Keys, index: int) -> bool:
    types = k.listed("mlp_layer_types", k.size("num_hidden_layers")) or []
    return bool(types[index] == "sparse")


def every(k: Keys, index: int) -> bool:
    return True


@dataclass(frozen=True)
class Shared:
    """What every token passes beside the experts.

    module  within the layer; names: of its matrices
    width   the key of its width; "": an expert's times `n_shared_experts`
    gate    a router of one output that decides how much of it counts; "": none
    """

    module: str
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    width: str = ""
    gate: str = ""

    def join(self, part: Part, k: Keys, f: Family, at: Place, block: str, width: int) -> Part:
        """`part`, experts of this width, with it beside them."""
        own = k.at(self.width, at.index, 0, 0) if self.width else width * k.at("n_shared_experts", at.index, 0, 0)
        if not own:
            return part
        made = _matrices(
            f"{at.layer}.{self.module}", "shared", self.names, k.size("hidden_size"), own, f.gated, k.flag(f.mlp_bias)
        )
        both = replace(part + made, wide=part.wide + own)
        return both + Part((Matrix(f"{block}.{self.gate}", 1, k.size("hidden_size"), "router"),) if self.gate else ())


@dataclass(frozen=True)
class Moe:
    """How a family has its experts.

    block       within the layer; names: of an expert's matrices; router: within the block
    sparse      which layers have them
    width       keys of an expert's width, the first that is there
    bias        router and experts have biases; correction: the router has one value per expert to balance them
    """

    block: str = "mlp"
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    router: str = "gate"
    sparse: Sparse = every
    width: tuple[str, ...] = ("moe_intermediate_size",)
    shared: Shared | None = None
    bias: bool = False
    correction: bool | str = False


def dense(k: Keys, f: Family, at: Place) -> Part:
    """An MLP."""
    hidden = k.size("hidden_size")
    wide = f.width(k, at) if callable(f.width) else k.at(f.width, at.index, 4 * hidden if f.four_times else None)
    stem = f"{at.layer}.{f.mlp}" if f.mlp else at.layer
    return _matrices(stem, "mlp", f.ffn, hidden, wide, f.gated, k.flag(f.mlp_bias))


def _matrices(stem: str, role: str, names: tuple[str, ...], hidden: int, width: int, gated: bool, bias: bool) -> Part:
    """Gate and up apart (three names), or together, or no gate (two)."""
    if len(names) == 3:
        ups = tuple((name, width, hidden) for name in names[:2])
    else:
        ups = ((names[0], 2 * width if gated else width, hidden),)
    return replace(linears(stem, role, *ups, (names[-1], hidden, width), bias=bias), wide=width)


def mixture(k: Keys, f: Family, moe: Moe, at: Place) -> Part:
    """Router, experts and what is shared, of one layer."""
    hidden = k.size("hidden_size")
    count = k.at("num_experts", at.index, least=0)
    block = f"{at.layer}.{moe.block}"
    part = Part()
    width = 0
    if count:
        chosen = k.at("num_experts_per_tok", at.index)
        if chosen > count or count > 1 << 16:
            raise QkitError(f"config.json says {chosen} experts per token, of {count}", "check config.json")
        key = next((key for key in moe.width if k.get(key) is not None), moe.width[0])
        width = k.at(key, at.index)
        one = _matrices(f"{block}.experts.*", "expert", moe.names, hidden, width, f.gated, moe.bias)
        experts = tuple(replace(m, count=count, active=chosen) for m in one.matrices)
        small = one.vectors * count
        router = Matrix(f"{block}.{moe.router}", count, hidden, "router")
        part = Part((router, *experts), small, expert_vectors=small, wide=chosen * width)
        part += Part((), (count if moe.bias else 0) + (count if k.flag(moe.correction) else 0))
    if moe.shared is not None:
        part = moe.shared.join(part, k, f, at, block, width)
    return part
