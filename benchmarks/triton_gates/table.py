"""The table of static figures: one row per kernel and architecture, and the gates a row must pass."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .measure import Launch, launched, measure
from .targets import BUDGET_GATED, MAX_REGISTERS, Target, target

COMMITTED = Path(__file__).parents[2] / "profiles" / "triton-static.csv"
SLACK = 1.05  # what a row may be above the committed one


@dataclass(frozen=True)
class Case:
    """A product to compile: `call` launches it with fake tensors (`measure.fake`).

    weights(launch)  weights one block takes in per turn of its loop (where it has none: in all); None for a launch
                     that reads no weights, such as the sum of a split
    only             targets it exists for; () for all
    sample           targets the test suite compiles it for
    budget           whether the instruction budget is a gate (few rows, memory-bound)
    """

    package: str
    kernel: str
    m: int
    n: int
    k: int
    bits: int
    call: Callable[[], Any]
    weights: Callable[[Launch], int | None]
    matrix: bool = True
    budget: bool = False
    only: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    package: str
    kernel: str
    m: int
    n: int
    k: int
    target: str
    launch: str = ""
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    threads: int = 0
    blocks_per_unit: int = 0
    loop: str = ""  # "loop", "no loop" (the whole program is counted)
    instructions: int = 0
    matrix: int = 0
    matrix_ops: str = ""
    loads: int = 0
    loads_128: int = 0
    int_to_float: int = 0
    convert: int = 0
    weights: int = 0  # of one turn
    per_weight: float = 0.0  # thread-instructions
    budget: float = 0.0
    note: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.package.split()[0], self.kernel, self.m, self.n, self.k, self.target, self.launch)


def rows_of(case: Case, on: Target) -> list[Compiled]:
    """Compiles a case for one target: a row per launch, or one that says why it cannot be."""
    about = (case.package, case.kernel, case.m, case.n, case.k, on.name)
    try:
        return [_row(case, on, about, launch) for launch in launched(on, case.call)]
    except Exception as error:  # whatever the compiler raises is what the table has to say
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return [Compiled(*about, note=f"does not compile: {type(error).__name__}: {(lines or [''])[-1][:160]}")]


def _row(case: Case, on: Target, about: tuple[Any, ...], launch: Launch) -> Compiled:
    code = measure(launch.compiled, on)
    c = code.counts
    weights = (case.weights(launch) or 0) * code.unroll
    return Compiled(
        *about,
        launch=launch.name,
        registers=code.registers,
        stack=code.stack,
        spills=code.spills,
        shared=code.shared,
        threads=code.threads,
        blocks_per_unit=on.blocks(code.threads, code.registers, code.shared),
        loop="loop" if c.looped else "no loop",
        instructions=c.total,
        matrix=c.matrix,
        matrix_ops=c.matrix_ops,
        loads=c.loads,
        loads_128=c.wide_loads,
        int_to_float=c.int_to_float,
        convert=c.convert,
        weights=weights,
        per_weight=round(c.total * code.threads / weights, 3) if weights else 0.0,
        budget=round(on.budget(case.bits), 2) if weights else 0.0,
    )


def faults(row: Compiled, case: Case, before: Compiled | None) -> list[str]:
    """What a row of ours fails; `before` is the committed one."""
    on = target(row.target)
    found = [row.note] if row.note else []
    if row.spills or row.stack:
        found.append(f"{row.spills} spills, {row.stack} bytes of stack")
    if row.registers > MAX_REGISTERS[on.backend]:
        found.append(f"{row.registers} registers, at most {MAX_REGISTERS[on.backend]}")
    if row.shared > on.shared:
        found.append(f"{row.shared} bytes of shared memory, at most {on.shared}")
    if row.weights:
        if case.matrix and not row.matrix:
            found.append("no matrix instruction in the main loop")
        if row.int_to_float:
            found.append(f"{row.int_to_float} conversions of integers to floats in the main loop")
        if not row.loads_128:
            found.append("no load of 128 bits in the main loop")
        if case.budget and row.target in BUDGET_GATED and row.per_weight > row.budget:
            found.append(f"{row.per_weight:.2f} thread-instructions per weight, at most {row.budget:.2f}")
    if before is not None:
        for name in ("registers", "shared", "per_weight"):
            now, then = getattr(row, name), getattr(before, name)
            if now > then * SLACK + (8 if name == "registers" else 0):
                found.append(f"{name} {now}, was {then}")
    return [f"{row.kernel} M={row.m} {row.target} {row.launch}: {fault}" for fault in found]


def load(path: Path = COMMITTED) -> dict[tuple[Any, ...], Compiled]:
    """The committed rows by `Compiled.key`; none where there is no file."""
    if not path.exists():
        return {}
    kinds = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Compiled)}
    with path.open(newline="") as file:
        rows = [Compiled(**{k: kinds[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]
    return {row.key: row for row in rows}


def save(rows: Iterable[Compiled], path: Path = COMMITTED) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Compiled)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
