"""Statistics and quantization of one decoder block, each linear as the calibration text reaches it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..spec.dtypes import dtype_name, torch_dtype
from .states import States
from .statistics import STATISTICS, statistic_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..kernels.weight import Weight
    from ..methods import Method, Quantized
    from ..sources.types import Source
    from ..spec import LayerSpec
    from .statistics import Statistic

    # Linears of one parent that share their input: (the parent's name, number of the stage).
    Group = tuple[str, int]


@dataclass(frozen=True)
class BlockResult:
    """One decoder block, done. Names are whole tensor names.

    index      counts decoder blocks from 0
    layers     weight name -> result, with its squared error; empty for a block that was finished before
    tokens     weight name -> how many calibration tokens reached it (an expert gets its share)
    checksums  weight name -> CRC-32 of what the source has
    replaced   tensors that the method changed beside or before quantizing, in the source's dtype
    """

    index: int
    layers: Mapping[str, Quantized] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, int] = field(default_factory=dict)
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Of a block, how its linears are called.

    stages  leaf names that share an input, in the order of their calls
    clean   whether a pass that is for a stage can be left where a later one begins: nothing of it is called then
    groups  the names of linears of each group
    """

    stages: list[set[str]]
    clean: list[bool]
    groups: dict[Group, list[str]]


_SLAB = 8 << 20  # weights dequantized at a time: bounds what is held beside the block
# Bytes of statistics of experts that are taken in one pass over what they are given; of at least one expert.
EXPERTS_BYTES = 1 << 30


class _Stop(Exception):
    """Ends a forward pass that has seen enough."""


class Runner:
    """Calls one block with the arguments the model would give it."""

    def __init__(self, block: nn.Module, calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]], device: str):
        self.block, self.calls, self.device = block, calls, device

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.calls[states.shape[0]]
        out = self.block(states.to(self.device), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, hidden: States) -> None:
        """Replace every batch by the block's output, in place."""
        for i in range(len(hidden)):
            hidden[i] = self(hidden[i])


def set_tensor(block: nn.Module, local: str, value: torch.Tensor) -> None:
    """Copy `value` into a parameter or buffer of the block, in the dtype and on the device it has there."""
    module, _, name = local.rpartition(".")
    getattr(block.get_submodule(module), name).copy_(value)


def install(module: nn.Module, q: Weight) -> None:
    """Put the quantized values in place of the weight, on its device and in its dtype."""
    from ..kernels.codes import values_of

    weight: Any = module.weight
    q = q.plain()
    step = max(1, _SLAB // q.in_features)
    for a in range(0, q.out_features, step):
        b = min(a + step, q.out_features)
        weight[a:b].copy_(values_of(q.rows(a, b), weight.dtype))


class Block:
    """Collects statistics and quantizes the linears of one block.

    A *stage* is the set of linears with the same leaf names (q, k, v); a *group* is the part of a stage that shares
    its input: the same parent (one attention, one expert)."""

    def __init__(
        self,
        runner: Runner,
        index: int,
        prefix: str,
        source: Source,
        schemes: Mapping[str, LayerSpec],
        method: Method,
        options: Mapping[str, Any],
        folder: Path | None = None,
        kind: Callable[[int, torch.device | str], Statistic] | None = None,
    ):
        """prefix: what the names of the block's tensors begin with; schemes: weight name -> LayerSpec; options: of
        the method; folder: for temporary files; kind: of statistic, by default the one that the method needs."""
        self.runner, self.index, self.prefix = runner, index, prefix
        self.source, self.schemes, self.method, self.options = source, schemes, method, options
        self.folder = folder
        self.names = {n.removeprefix(prefix).removesuffix(".weight"): n for n in schemes}
        self.modules = {local: runner.block.get_submodule(local) for local in self.names}
        self.results: dict[str, Quantized] = {}
        self.tokens: dict[str, int] = {}
        self.checksums: dict[str, int] = {}
        self.replaced: dict[str, torch.Tensor] = {}
        self.statistics: dict[Group, Statistic] = {}
        self.kind = kind or STATISTICS[method.needs or ""]

    def quantize(self, hidden: States, side_by_side: bool) -> BlockResult:
        """Quantize every linear and replace `hidden`, a tensor per batch, by the quantized block's output, in place.

        side_by_side: one pass, whose activations are alive for all batches; or one (partial) pass per stage, and in one
        of them what the experts are given is kept, who are then quantized a few at a time. The result is the same, bit
        for bit."""
        self.take(self.layout(hidden[0][:1]))
        if self.method.prepares:
            self._prepare(hidden)
        if side_by_side:
            self._side_by_side(hidden)
        else:
            self._stage_by_stage(hidden)
        layers = {name: self.results[name] for name in self.names.values()}
        return BlockResult(self.index, layers, self.tokens, self.checksums, self.replaced)

    def _side_by_side(self, hidden: States) -> None:
        """Each batch's pass waits at a linear that is not quantized, until the passes of all batches wait there."""
        from greenlet import getcurrent, greenlet

        def run(batch: int) -> None:
            hidden[batch] = self.runner(hidden[batch])

        def wait(local: str, x: torch.Tensor) -> None:
            if self.names[local] not in self.results:
                group = self._group(local)
                self._statistic(group).add(x)
                getcurrent().parent.switch(group)

        with self._hooks(wait):
            passes = [greenlet(run) for _ in hidden]
            waiting = [(each, each.switch(i)) for i, each in enumerate(passes)]
            while waiting := [(each, group) for each, group in waiting if not each.dead]:
                here = waiting[0][1]
                self._solve([here])
                waiting = [(each, each.switch() if group == here else group) for each, group in waiting]
        self._solve(self.groups)  # what is never called

    def _stage_by_stage(self, hidden: States) -> None:
        apart = {group: name for group in self.groups if (name := self._experts_of(group)) is not None}
        for stage in range(len(self.stages)):
            own = [group for group in self.groups if group[1] == stage and group not in apart]
            if not own:
                continue
            self.see(stage, own, hidden)
            self._solve(own)
        for name in dict.fromkeys(apart.values()):
            self._by_expert(name, hidden, [group for group, inside in apart.items() if inside == name])
        self.runner.advance(hidden)

    def _pass(self, hidden: Iterable[torch.Tensor]) -> None:
        """Run the block until something has seen enough."""
        for states in hidden:
            with suppress(_Stop):
                self.runner(states)

    def _experts_of(self, group: Group) -> str | None:
        """The name of the module of experts that a group lies in, if any."""
        from ..models.experts import Experts

        name = group[0].rpartition(".")[0]
        return name if name and isinstance(self.runner.block.get_submodule(name), Experts) else None

    def _by_expert(self, name: str, hidden: States, groups: Sequence[Group]) -> None:
        """Quantize experts, of which each depends on what it is given alone: that is kept, for all of them."""
        experts: Any = self.runner.block.get_submodule(name)
        given, rows = States(len(hidden), self.folder), []

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states, own = experts.routed(*args, **kwargs)
            given.append(states)
            rows.append(own)
            raise _Stop

        handle = experts.register_forward_pre_hook(take, with_kwargs=True)
        self._pass(hidden)
        handle.remove()
        for members in self._together(groups):
            indices = [int(parent.rpartition(".")[2]) for parent in dict.fromkeys(parent for parent, _ in members)]
            for stage in sorted({stage for _, stage in members}):
                own = [group for group in members if group[1] == stage]
                with self._hooks(partial(self._observe_expert, stage, frozenset(own))):
                    for states, where in zip(given, rows, strict=True):
                        x = states.to(self.runner.device)
                        for index in indices:
                            with suppress(_Stop):
                                experts[index](x[where[index]])
                self._solve(own)

    def _together(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """The groups of as many experts as have room for their statistics at once."""
        members: list[Group] = []
        nbytes = 0
        of_expert: dict[str, list[Group]] = {}
        for group in groups:
            of_expert.setdefault(group[0], []).append(group)
        for own in of_expert.values():
            more = max(self._statistic_bytes(group) for group in own)
            if members and nbytes + more > EXPERTS_BYTES:
                yield members
                members, nbytes = [], 0
            members += own
            nbytes += more
        yield members

    def _statistic_bytes(self, group: Group) -> int:
        assert self.method.needs is not None
        return statistic_bytes(self.method.needs, self._inputs(group))

    def _prepare(self, hidden: States) -> None:
        """Let the method fold what it wants into the block, from the inputs of the block as it was."""
        with self._hooks(self._observe):
            for states in hidden:
                self.runner(states)
        statistics = {tuple(m): self._statistic(group).result() for group, m in self.groups.items()}
        self.statistics.clear()
        for local, value in self.method.prepare(self.runner.block, self._read, statistics).items():
            name = self.prefix + local
            self.replaced[name] = value.to("cpu", torch_dtype(self.source.meta(name).dtype)).contiguous()
            set_tensor(self.runner.block, local, self.replaced[name])

    def _read(self, local: str) -> torch.Tensor:
        """A tensor of the block at the source's precision, on the device, as the method may have replaced it. Not to be
        changed."""
        name = self.prefix + local
        if name in self.replaced:
            return self.replaced[name].to(self.runner.device)
        module, _, leaf = local.rpartition(".")
        held: torch.Tensor = getattr(self.runner.block.get_submodule(module), leaf)
        if dtype_name(held.dtype) == self.source.meta(name).dtype:
            return held.detach()
        return self.source.read(name).to(self.runner.device)

    def layout(self, sample: torch.Tensor) -> Layout:
        """Find stages and groups: which leaf names share an input, and in which order they are called."""
        order: list[str] = []
        last: list[tuple[str, torch.Tensor]] = []
        merged: list[set[str]] = []

        def note(local: str, x: torch.Tensor) -> None:
            leaf = _leaf(local)
            order.append(leaf)
            if last and last[0][1] is x:
                next(stage for stage in merged if _leaf(last[0][0]) in stage).add(leaf)
            elif not any(leaf in stage for stage in merged):
                merged.append({leaf})
            last[:] = [(local, x)]

        with self._hooks(note):
            self.runner(sample)
        called = {leaf for stage in merged for leaf in stage}
        merged += [{leaf} for leaf in sorted({_leaf(local) for local in self.names} - called)]
        of = {leaf: index for index, stage in enumerate(merged) for leaf in stage}
        stages = [of[leaf] for leaf in order]
        clean = [
            not any(s <= stage for s in stages[stages.index(later) :])
            if (later := next((s for s in stages if s > stage), None)) is not None
            else False
            for stage in range(len(merged))
        ]
        groups: dict[Group, list[str]] = {}
        for local in self.names:
            groups.setdefault((local.rpartition(".")[0], of[_leaf(local)]), []).append(local)
        return Layout(merged, clean, groups)

    def take(self, layout: Layout) -> None:
        """Work with what this, or the same block elsewhere, was found to be."""
        self.stages, self.clean, self.groups = layout.stages, layout.clean, layout.groups

    def see(self, stage: int, own: Collection[Group], hidden: Iterable[torch.Tensor]) -> None:
        """Run the block until the statistics of the groups `own` of a stage have seen all there is."""
        with self._hooks(partial(self._observe_stage, stage, frozenset(own))):
            self._pass(hidden)

    def _stage(self, leaf: str) -> int:
        return next(i for i, stage in enumerate(self.stages) if leaf in stage)

    def _group(self, local: str) -> Group:
        return local.rpartition(".")[0], self._stage(_leaf(local))

    def _hooks(self, see: Callable[[str, torch.Tensor], None]) -> _Hooks:
        return _Hooks(self.modules, see)

    def _statistic(self, group: Group) -> Statistic:
        if group not in self.statistics:
            self.statistics[group] = self.kind(self._inputs(group), self.runner.device)
        return self.statistics[group]

    def _inputs(self, group: Group) -> int:
        return self.source.meta(self.names[self.groups[group][0]]).shape[1]

    def _observe(self, local: str, x: torch.Tensor) -> None:
        group = self._group(local)
        if local == self.groups[group][0]:  # once for all that share the input
            self._statistic(group).add(x)

    def _observe_stage(self, stage: int, own: Collection[Group], local: str, x: torch.Tensor) -> None:
        group = self._group(local)
        if group in own:
            self._observe(local, x)
        elif group[1] > stage and self.clean[stage]:
            raise _Stop

    def _observe_expert(self, stage: int, own: Collection[Group], local: str, x: torch.Tensor) -> None:
        group = self._group(local)
        if group in own:
            self._observe(local, x)
        elif group[1] > stage:
            raise _Stop

    def _solve(self, groups: Iterable[Group]) -> None:
        """Quantize what is left of `groups` and put it into the block."""
        from ..kernels import crc32
        from ..kernels.codes import squared_error

        for group in groups:
            members = [local for local in self.groups[group] if self.names[local] not in self.results]
            if not members:
                continue
            weights = [self._read(f"{local}.weight") for local in members]
            seen = self._statistic(group)
            del self.statistics[group]
            schemes = [self.schemes[self.names[local]] for local in members]
            try:
                solved = self.method.quantize(weights, seen.result(), schemes, **self.options)
            except QkitError as error:
                names = ", ".join(self.names[local] for local in members)
                raise QkitError(f"{names}: {error.message}", error.hint) from error
            for i, (local, result) in enumerate(zip(members, solved, strict=True)):
                name, weight = self.names[local], result.weight.to("cpu")
                original = (self.source.read(name) if name in self.replaced else weights[i]).to("cpu")
                self.checksums[name] = crc32(original)
                self.results[name] = replace(result, weight=weight, squared=squared_error(original, weight))
                self.tokens[name] = seen.tokens
                del original
                install(self.modules[local], result.weight)


class _Hooks:
    """While entered, calls see(local name, input) before each module runs."""

    def __init__(self, modules: dict[str, nn.Module], see: Callable[[str, torch.Tensor], None]):
        self.modules, self.see = modules, see

    def __enter__(self) -> None:
        def hook(local: str) -> Callable[..., None]:
            return lambda module, args: self.see(local, args[0])

        self.handles = [m.register_forward_pre_hook(hook(local)) for local, m in self.modules.items()]

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


def _leaf(local: str) -> str:
    return local.rpartition(".")[2]
