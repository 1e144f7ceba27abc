"""Compiles every Triton kernel for eight architectures, without a GPU, and writes what the machine code costs.

    python benchmarks/triton_static.py                  # write profiles/triton-static.csv
    python benchmarks/triton_static.py --check          # compare with it and with the gates; exit 1 on a regression
    python benchmarks/triton_static.py --peers          # other packages' kernels, too (their packages are downloaded)
    python benchmarks/triton_static.py --only nf4 --targets sm_80,sm_90 --print

A row: registers, stack and spills, shared memory, and in the main loop the matrix instructions, 128-bit loads,
conversions, and thread-instructions per weight beside the budget (`triton_gates/targets.py` has the formula). Rows of
other packages stay as they are unless --peers is given.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does by default; 3.10 would not

import checkout  # noqa: F401
from triton_gates import table
from triton_gates.cases import cases
from triton_gates.targets import TARGETS, target


def show(row: table.Compiled) -> str:
    if row.note:
        return f"{row.package:14} {row.kernel:28} {row.m:4} {row.target:8} {row.note}"
    cost = f"{row.per_weight:6.2f} of {row.budget:5.2f} per weight" if row.weights else ""
    return (
        f"{row.package:14} {row.kernel:28} {row.m:4} {row.target:8} {row.registers:3} regs {row.spills:2} spills "
        f"{row.shared:6} B {row.instructions:5} instr {row.matrix:3} matrix {row.loads_128:2}/{row.loads:2} wide "
        f"{row.int_to_float:2} i2f {cost}"
    )


def write(rows: dict[tuple[Any, ...], table.Compiled], out: Path) -> None:
    """Ours first, the rest by package."""
    table.save((rows[key] for key in sorted(rows, key=lambda k: (k[0] != "qkit", k))), out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a row fails a gate")
    parser.add_argument("--gates", action="store_true", help="--check the gates alone, all cases (another Triton)")
    parser.add_argument("--sample", action="store_true", help="only what the test suite compiles")
    parser.add_argument("--peers", action="store_true", help="compile other packages' kernels, too")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--rows", default="", help="comma-separated values of M; default: all")
    parser.add_argument("--targets", default="", help="comma-separated; default: all")
    parser.add_argument("--print", action="store_true", help="write nothing, only print")
    parser.add_argument("--out", type=Path, default=table.COMMITTED)
    args = parser.parse_args()
    try:
        targets = [target(name) for name in args.targets.split(",")] if args.targets else list(TARGETS)
    except ValueError as error:
        parser.error(str(error))
    before = table.load(args.out)
    rows = dict(before)
    faults: list[str] = []
    rows_asked = {int(m) for m in args.rows.split(",") if m}
    chosen = [case for case in cases() if args.only in case.kernel and (not rows_asked or case.m in rows_asked)]
    if args.peers:
        from triton_gates.peers import peer_cases

        chosen += [case for case in peer_cases() if args.only in case.kernel or args.only in case.package]
    whole = not (args.only or args.rows or args.targets or args.sample)
    seen = set()
    writes = not args.check and not args.print
    for case in chosen:
        if writes and seen:  # a run that is interrupted keeps what it has
            write(rows, args.out)
        for on in targets:
            left_out = case.only and on.name not in case.only and not args.gates
            if left_out or (args.sample and on.name not in case.sample):
                continue
            for row in table.rows_of(case, on):
                print(show(row), flush=True)
                rows[row.key] = row
                seen.add(row.key)
                if case.package == "qkit":
                    # Another Triton's code is held to what makes it run, not to the last instruction.
                    held = replace(case, budget=False) if args.gates else case
                    faults += table.faults(row, held, before.get(row.key) if args.check and not args.gates else None)
    if whole:  # what no longer exists leaves the table
        ours = {case.package.split()[0] for case in chosen}
        gone = [key for key in before if key[0] in ours and key not in seen]
        if args.check:
            faults += [f"committed, but no longer compiled: {key}" for key in gone]
        for key in gone:
            del rows[key]
    if writes:
        write(rows, args.out)
        print(f"{len(rows)} rows in {args.out}", file=sys.stderr)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
