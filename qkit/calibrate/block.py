"""Statistics and quantization of one decoder block, each linear as the calibration text reaches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import QkitError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..kernels.weight import Weight
    from ..sources.types import Source
    from ..spec import LayerSpec


@dataclass(frozen=True)
class LayerResult:
    """error: squared output error / squared output on the calibration inputs; tokens: how many reached the layer.

    method, fallback: as in `gptq.GptqResult`."""

    weight: Weight
    error: float
    method: str
    fallback: str | None
    tokens: int


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

    def advance(self, hidden: list[torch.Tensor]) -> None:
        """Replace every batch by the block's output, in place."""
        for i, states in enumerate(hidden):
            hidden[i] = self(states).to("cpu")


def install(module: nn.Module, q: Weight) -> None:
    """Put the quantized values in place of the weight, on its device and in its dtype."""
    from ..kernels.codes import values_of

    weight = module.weight
    assert hasattr(weight, "copy_")
    weight.copy_(values_of(q, weight.dtype))  # type: ignore[operator,arg-type]


class Block:
    """Collects statistics and quantizes the linears of one block.

    A *stage* is the set of linears with the same leaf names (q, k, v); a *group* is the part of a stage that shares
    its input: the same parent (one attention, one expert)."""

    def __init__(
        self,
        runner: Runner,
        names: dict[str, str],
        source: Source,
        schemes: Mapping[str, LayerSpec],
        progress: Callable[[str], None] | None,
        options: dict[str, Any],
    ):
        self.runner, self.names, self.source, self.schemes = runner, names, source, schemes
        self.progress, self.options = progress, options
        self.modules = {local: runner.block.get_submodule(local) for local in names}
        self.results: dict[str, LayerResult] = {}
        self.hessians: dict[tuple[str, int], torch.Tensor] = {}
        self.counts: dict[tuple[str, int], int] = {}

    def quantize(self, hidden: list[torch.Tensor]) -> dict[str, LayerResult]:
        """Quantize every linear and replace `hidden` by the quantized block's output, in place."""
        self._discover(hidden[0][:1])
        if len(hidden) == 1:
            with self._hooks(self._quantize_on_arrival):
                hidden[0] = self.runner(hidden[0]).to("cpu")
            self._solve(self.groups)  # those that no token reached
        else:
            for stage in range(len(self.stages)):
                with self._hooks(partial(self._observe_stage, stage)):
                    for states in hidden:
                        try:
                            self.runner(states)
                        except _Stop:
                            continue
                self._solve([group for group in self.groups if group[1] == stage])
            self.runner.advance(hidden)
        return {name: self.results[name] for name in self.names.values()}

    def _discover(self, sample: torch.Tensor) -> None:
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
        self.stages = merged
        stages = [self._stage(leaf) for leaf in order]
        # A stage can be left early where nothing of it is called after something later.
        self.clean = [
            not any(s <= stage for s in stages[stages.index(later) :])
            if (later := next((s for s in stages if s > stage), None)) is not None
            else False
            for stage in range(len(merged))
        ]
        self.groups: dict[tuple[str, int], list[str]] = {}
        for local in self.names:
            self.groups.setdefault(self._group(local), []).append(local)

    def _stage(self, leaf: str) -> int:
        return next(i for i, stage in enumerate(self.stages) if leaf in stage)

    def _group(self, local: str) -> tuple[str, int]:
        return local.rpartition(".")[0], self._stage(_leaf(local))

    def _hooks(self, see: Callable[[str, torch.Tensor], None]) -> _Hooks:
        return _Hooks(self.modules, see)

    def _quantize_on_arrival(self, local: str, x: torch.Tensor) -> None:
        group = self._group(local)
        if group in self.groups and self.names[local] not in self.results:
            self._accumulate(group, x)
            self._solve([group])

    def _observe_stage(self, stage: int, local: str, x: torch.Tensor) -> None:
        group = self._group(local)
        if group[1] == stage:
            if local == self.groups[group][0]:  # once for all that share the input
                self._accumulate(group, x)
        elif group[1] > stage and self.clean[stage]:
            raise _Stop

    def _accumulate(self, group: tuple[str, int], x: torch.Tensor) -> None:
        import torch

        from ..methods import gptq

        if group not in self.hessians:
            n = x.shape[-1]
            self.hessians[group] = torch.zeros(n, n, dtype=torch.float32, device=x.device)
        gptq.accumulate(self.hessians[group], x)
        self.counts[group] = self.counts.get(group, 0) + x.shape[:-1].numel()

    def _solve(self, groups: Iterable[tuple[str, int]]) -> None:
        """Quantize what is left of `groups` and put it into the block."""
        import torch

        from ..methods import gptq

        for group in groups:
            members = [local for local in self.groups[group] if self.names[local] not in self.results]
            if not members:
                continue
            weights = [self.source.read(self.names[local]).to(self.runner.device) for local in members]
            hessian = self.hessians.pop(group, None)
            if hessian is None:
                hessian = torch.zeros(weights[0].shape[1], weights[0].shape[1], device=self.runner.device)
            schemes = [self.schemes[self.names[local]] for local in members]
            try:
                solved = gptq.quantize_all(weights, gptq.symmetrize(hessian), schemes, **self.options)
            except QkitError as error:
                names = ", ".join(self.names[local] for local in members)
                raise QkitError(f"{names}: {error.message}", error.hint) from error
            for local, result in zip(members, solved, strict=True):
                name = self.names[local]
                install(self.modules[local], result.weight)
                q = result.weight.to("cpu")
                count = self.counts.get(group, 0)
                self.results[name] = LayerResult(q, result.error, result.method, result.fallback, count)
                if self.progress is not None:
                    self.progress(name)


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
