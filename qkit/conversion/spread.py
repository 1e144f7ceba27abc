"""Calibrated methods on many machines: a decoder block at a time, in the pieces of `calibrate.apart`.

The driver keeps the hidden states between two blocks and writes what is finished. So all that the cluster holds can be
made again from what the driver has: where it loses something for good, the block is begun anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..calibrate.block import BlockResult
from ..errors import QkitError
from ..methods.base import Quantized, divided
from ..progress import notify
from .execute import produce_of
from .pool import RESTARTS, Job, Lost, Pool, Refused, accepted, check_fits, compute_on, machines, plan_of
from .predict import PART_BATCHES, spread_memory
from .produce import Produce
from .tasks import block_schemes
from .wire import Wire

if TYPE_CHECKING:
    import torch

    from ..calibrate.apart import Apart, Rows
    from ..calibrate.block import Group, Layout
    from ..calibrate.states import States
    from ..calibrate.statistics import Hessian
    from ..kernels.weight import Weight


@dataclass(frozen=True)
class Done:
    """A weight. checksum: CRC-32 of what the source has; tokens: how many reached it."""

    name: str
    result: Quantized
    checksum: int
    tokens: int


class Spread:
    """`calibrate.blocks.Elsewhere`, on the workers of a cluster."""

    def __init__(self, pool: Pool, job: Job, produce: Produce, shape: tuple[int, int]):
        """shape: [samples, length] of the text."""
        import torch

        method = divided(produce.method)
        assert method is not None
        nodes = machines(pool)
        threads = torch.get_num_threads()
        self.cpus = max(1, min(threads, *(node.cpus for node in nodes)))
        self.slots = sum(node.cpus // self.cpus for node in nodes)
        self.schemes = block_schemes(produce.plan.tasks)
        self.memory = spread_memory(produce.source, self.schemes, shape, produce.method)
        check_fits(self.memory, nodes)
        self.pool, self.source, self.method = pool, produce.source, method
        self.job = replace(job, shape=shape, threads=threads)

    def quantize(self, index: int, at: str, hidden: States) -> BlockResult:
        return self._whatever_happens(lambda: self._quantize(index, at, hidden))

    def advance(self, index: int, ready: Mapping[str, Weight | torch.Tensor], hidden: States) -> None:
        def advance() -> None:
            states = self._sent(hidden)
            self._receive(hidden, self._advanced(index, states, [self.pool.put(Wire(dict(ready)))]))

        self._whatever_happens(advance)

    def _whatever_happens(self, work: Callable[[], Any]) -> Any:
        for left in reversed(range(RESTARTS + 1)):
            try:
                return work()
            except Lost as error:
                if not left:
                    raise
                notify(f"WARNING: {error.message}; the block is begun anew")

    def _quantize(self, index: int, at: str, hidden: States) -> BlockResult:
        """All of a block is asked for at once: what waits for what is the cluster's to follow."""
        from ..calibrate import apart

        states = self._sent(hidden)
        layout: Layout = self._value(self._ask("layout", index, Wire(hidden[0][:1])))
        done: dict[str, Any] = {}
        for stage in range(len(layout.stages)):
            groups = {
                group: [f"{at}{local}.weight" for local in members]
                for group, members in layout.groups.items()
                if group[1] == stage
            }
            ready = list(done.values())
            inputs = [self._ask("inputs", index, layout, stage, each, *ready) for each in states]
            features = {group: self.source.meta(names[0]).shape[1] for group, names in groups.items()}
            summed: dict[Group, list[Any]] = {group: [] for group in groups}
            for pieces in apart.sums(features):
                ticket = None
                for each in inputs:  # tickets that nobody has any more free what they stand for
                    ticket = self._ask("add", pieces, each, ticket)
                for group in dict.fromkeys(piece.group for piece in pieces):
                    summed[group].append(ticket)
            del inputs
            for group, names in groups.items():
                done |= self._solved(group, names, summed.pop(group))
        advanced = self._advanced(index, states, list(done.values()))
        del states
        found: list[Done] = [self._value(ticket) for ticket in done.values()]
        self._receive(hidden, advanced)
        by_name = {each.name: each for each in found}
        ordered = [by_name[name] for name in self.schemes if name in by_name]
        return BlockResult(
            index,
            {each.name: each.result for each in ordered},
            {each.name: each.tokens for each in ordered},
            {each.name: each.checksum for each in ordered},
        )

    def _solved(self, group: Group, names: Sequence[str], summed: Sequence[Any]) -> dict[str, Any]:
        """Tickets of weights that share an input, by name."""
        shapes = [self.source.meta(name).shape for name in names]
        specs = [self.schemes[name] for name in names]
        begun = self._ask("begin", group, tuple(names), *summed)
        parts: list[list[tuple[int, Any]]] = [[] for _ in names]
        for members in self.method.slabs([(shape[0], shape[1]) for shape in shapes], specs):
            rows = [(names[i], a, b) for i, a, b in members]
            ticket = self._ask("solve", rows, begun)
            for place, (i, _, _) in enumerate(members):
                parts[i].append((place, ticket))
        return {
            name: self._ask("join", name, [place for place, _ in own], *(ticket for _, ticket in own))
            for name, own in zip(names, parts, strict=True)
        }

    def _sent(self, hidden: States) -> list[Any]:
        """Tickets of parts of the text: runs of batches."""
        return [self.pool.put(Wire([hidden[i] for i in part])) for part in self._parts(len(hidden))]

    def _parts(self, batches: int) -> list[range]:
        count = min(batches, max(-(-batches // PART_BATCHES), 2 * self.slots))
        return [range(batches * i // count, batches * (i + 1) // count) for i in range(count)]

    def _advanced(self, index: int, states: Sequence[Any], ready: Sequence[Any]) -> list[Any]:
        return [self._ask("advance", index, each, *ready) for each in states]

    def _receive(self, hidden: States, advanced: list[Any]) -> None:
        """Only where all of it is there, the states are replaced."""
        made = [self._value(ticket) for ticket in advanced]
        for part, states in zip(self._parts(len(hidden)), made, strict=True):
            for i, each in zip(part, states, strict=True):
                hidden[i] = each

    def _ask(self, step: str, *args: Any) -> Any:
        return self.pool.submit(run_step, self.job, step, *args, cpus=self.cpus, memory=self.memory)

    def _value(self, ticket: Any) -> Any:
        return accepted(self.pool.result(ticket)).value


# What follows runs in a worker.


def run_step(job: Job, step: str, *args: Any) -> Wire | Refused:
    """One of `_Steps`, with what others gave."""
    import torch

    for arg in args:
        if isinstance(arg, Refused):
            return arg
    try:
        compute_on(job.threads)
        with torch.no_grad():
            steps = _steps(job)
            return Wire(getattr(steps, step)(*(arg.value if isinstance(arg, Wire) else arg for arg in args)))
    except QkitError as error:
        return Refused(error.message, error.hint)


@functools.lru_cache(maxsize=1)
def _steps(job: Job) -> _Steps:
    return _Steps(job)


class _Steps:
    """What a worker is asked for. Names of weights are whole."""

    def __init__(self, job: Job):
        self.produce = produce_of(plan_of(job))
        self.schemes = block_schemes(self.produce.plan.tasks)
        method = divided(self.produce.method)
        assert method is not None
        self.method, self.shape = method, job.shape

    @functools.cached_property
    def apart(self) -> Apart:
        """Where the model is run, it is built once."""
        from ..calibrate.apart import Apart

        return Apart(self.produce.source, self.schemes, self.shape, self.method)

    def layout(self, index: int, sample: torch.Tensor) -> Layout:
        return self.apart.layout(index, sample)

    def inputs(
        self, index: int, layout: Layout, stage: int, states: Sequence[torch.Tensor], *ready: Done
    ) -> dict[Group, torch.Tensor]:
        return self.apart.inputs(index, layout, stage, states, _weights(ready))

    def advance(self, index: int, states: Sequence[torch.Tensor], *ready: Any) -> list[torch.Tensor]:
        return self.apart.advance(index, states, _weights(ready))

    def add(
        self, pieces: Sequence[Rows], inputs: Mapping[Group, torch.Tensor], before: Mapping[Rows, Hessian] | None
    ) -> dict[Rows, Hessian]:
        from ..calibrate.apart import add

        return add(pieces, inputs, before)

    def begin(self, group: Group, names: Sequence[str], *summed: Mapping[Rows, Hessian]) -> tuple[Any, int]:
        from ..calibrate.apart import begin

        try:
            return begin(self.method, group, summed, self.produce.options)
        except QkitError as error:
            raise QkitError(f"{', '.join(names)}: {error.message}", error.hint) from error

    def solve(self, rows: Sequence[tuple[str, int, int]], begun: tuple[Any, int]) -> tuple[list[Any], int]:
        """rows: (weight, first, end)."""
        prepared, tokens = begun
        weights = [self._rows(*each) for each in rows]
        try:
            made = self.method.solve(weights, prepared, self.schemes[rows[0][0]], **self.produce.options)
        except QkitError as error:
            raise QkitError(f"{', '.join(name for name, _, _ in rows)}: {error.message}", error.hint) from error
        return made, tokens

    def _rows(self, name: str, first: int, end: int) -> torch.Tensor:
        read = self.produce.source.rows(name)
        return self.produce.source.read(name)[first:end] if read is None else read(first, end)

    def join(self, name: str, places: Sequence[int], *parts: tuple[list[Any], int]) -> Done:
        """places: where among the rows that were solved together those of this weight are."""
        from ..kernels import crc32
        from ..kernels.codes import squared_error

        result = self.method.join([made[place] for place, (made, _) in zip(places, parts, strict=True)])
        original = self.produce.source.read(name)
        squared = squared_error(original, result.weight)
        return Done(name, replace(result, squared=squared), crc32(original), parts[0][1])


def _weights(ready: Sequence[Any]) -> list[Mapping[str, Weight | torch.Tensor]]:
    return [{each.name: each.result.weight} if isinstance(each, Done) else each for each in ready]
