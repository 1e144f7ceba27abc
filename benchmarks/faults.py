"""Conversions that are killed, interrupted, told that the disk is full: what is left, and what the same command does.

    python benchmarks/faults.py [--count 200] [--seed 0] [--only NAME ...] [--work DIR]

Tiny checkpoints are converted to every format by every method, each time in a process of its own, in which one thing
goes wrong at a random moment (`fault_parts/inject.py`); one to three such runs, and then the same command undisturbed.
After every run: the exit code is one that is documented, with an error and a hint and no traceback; OUT is absent, or
has the bytes of a conversion that nothing disturbed (or of the earlier one that it replaces); so has every file of the
work folder that has its final name; the source is what it was. At the end nothing is beside OUT. A table, then what was
wrong, and one JSON document on the last line of stdout; exit code 1 where anything was wrong. Needs Linux.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fault_parts import cases
from fault_parts.cases import Case
from fault_parts.inject import DEATHS, SIGNALS, WRITES, Fault, start

# Kinds of faults, in turns: name -> how one is drawn, given how often each operation comes in an undisturbed run and
# how many milliseconds that takes.
KINDS = ("kill at an operation", "write failure", "kill at a time", "kill at an operation", "worker death",
         "write failure", "interruption", "torn write", "two runs at once")  # fmt: skip


def draw(kind: str, counts: dict[str, int], took: float, rng: random.Random) -> Fault:
    def nth(at: str) -> int:
        return rng.randint(1, max(1, counts.get(at, 1)))

    if kind == "kill at a time":
        return Fault("SIGKILL", "time", rng.randint(1, int(took) + 20))
    if kind == "kill at an operation":
        return Fault("SIGKILL", "any", nth("any"), late=rng.random() < 0.5)
    if kind == "interruption":
        name = rng.choice(SIGNALS[1:])
        at = rng.choice(("any", "time"))
        return Fault(name, at, rng.randint(1, int(took) + 20) if at == "time" else nth(at), late=rng.random() < 0.5)
    if kind == "worker death":
        return Fault(rng.choice(list(DEATHS)), "step", nth("step"))
    if kind == "torn write":
        return Fault(rng.choice(("short", "torn")), "write", nth("write"))
    at = rng.choice([*(name for name in WRITES if counts.get(name)), "any"])
    return Fault(rng.choice(("ENOSPC", "EIO", "EROFS", "EDQUOT")), at, nth(at), lasts=rng.random() < 0.5)


def hashes(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file below; nothing where there is no folder."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@dataclass
class Ran:
    """A run that has ended. code: its exit code, negative for a signal."""

    code: int
    stderr: str
    happened: bool
    milliseconds: float = 0.0


@dataclass
class Expected:
    """An undisturbed run of a case, and the folder that it would replace."""

    files: dict[str, str]
    earlier: dict[str, str]
    counts: dict[str, int]
    milliseconds: float


@dataclass
class Tally:
    """What was done and found."""

    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    by_case: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    compared: int = 0
    wrong: list[str] = field(default_factory=list)


class Harness:
    """Cases below one folder: models, undisturbed results, and a place where things go wrong."""

    def __init__(self, work: Path, seed: int):
        self.work, self.rng, self.tally = work, random.Random(seed), Tally()
        self.logs = (work / "log", work / "second")
        for log in self.logs:
            log.mkdir()
        cases.small_files()

    @functools.cache  # noqa: B019  # one harness a process
    def model(self, name: str) -> dict[str, str]:
        """The hashes of a model's files, which are made here."""
        pid = os.fork()  # a process that has computed in threads cannot be forked: in this one nothing is ever computed
        if not pid:
            cases.make_model_folder(name, self.work / "models" / name)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, f"{name} could not be made"
        return hashes(self.work / "models" / name)

    def run(self, case: Case, out: Path, fault: Fault | None = None, options: Iterable[str] | None = None) -> Ran:
        began = time.perf_counter()
        pid = self._start(case, out, fault, options)
        if fault is not None and fault.at == "time":
            time.sleep(fault.nth / 1000)
            os.kill(pid, getattr(signal, fault.kind))  # not waited for yet, so the id is still its own
        ran = self._ended(pid)
        ran.milliseconds = 1000 * (time.perf_counter() - began)
        ran.happened |= fault is not None and fault.at == "time" and ran.code != 0
        return ran

    def _start(
        self, case: Case, out: Path, fault: Fault | None = None, options: Iterable[str] | None = None, log: int = 0
    ) -> int:
        source = self.work / "models" / case.model
        argv = ["convert", str(source), "-o", str(out), *(case.options if options is None else options)]
        return start(argv, out.parent, fault, self.logs[log])

    def _ended(self, pid: int, log: int = 0) -> Ran:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        stderr = (self.logs[log] / "stderr").read_text()
        return Ran(code, stderr, (self.logs[log] / "happened").exists())

    def two(self, case: Case, out: Path, wait: float) -> tuple[Ran, Ran]:
        """The same command twice, the second time `wait` seconds later."""
        first = self._start(case, out)
        time.sleep(wait)
        second = self._start(case, out, log=1)
        return self._ended(first), self._ended(second, log=1)

    @functools.cache  # noqa: B019  # one harness a process
    def expected(self, case: Case) -> Expected:
        place = self.work / "whole" / case.name
        self.model(case.model)
        earlier: dict[str, str] = {}
        if case.replaces:
            kept = [word for word in case.options if word != "--restart"]
            done = self.run(case, place / "earlier", options=[*kept, "--skip", "*.v_proj"])
            assert done.code == 0, done.stderr
            earlier = hashes(place / "earlier")
        done = self.run(case, place / "out")
        assert done.code == 0, f"{case.name}: {done.stderr}"
        told = json.loads((self.logs[0] / "counts").read_text())
        for module in told["modules"]:  # the next child finds them imported
            if module not in sys.modules:
                with suppress(Exception):
                    importlib.import_module(module)
        gc.freeze()  # children leave the pages of what is there alone
        return Expected(hashes(place / "out"), earlier, told["counts"], done.milliseconds)

    def one(self, case: Case, kinds: list[str]) -> None:
        """Faults of these kinds, one run each, then a run without."""
        expected = self.expected(case)
        place = self.work / "disturbed"
        out = place / "out"
        place.mkdir()
        if case.replaces:
            shutil.copytree(self.work / "whole" / case.name / "earlier", out)
        told: list[str] = []
        for kind in kinds:
            if kind == "two runs at once":
                wait = self.rng.uniform(0, expected.milliseconds / 1000)
                both = self.two(case, out, wait)
                told.append(f"{kind}, {wait:.3f} s apart -> {[ran.code for ran in both]}")
                self.tally.faults[kind] += 1
                self.tally.by_case[case.name] += 1
                problems = [] if 0 in (both[0].code, both[1].code) else ["neither finished"]
                for ran in both:
                    self.tally.ends[self._end(ran)] += 1
                    problems += [*self._said(ran, {0, 2}), *self._left(case, expected, out, both[0])]
                self.tally.wrong += [f"{case.name}: {told}: {problem}" for problem in problems]
                continue
            fault = draw(kind, expected.counts, expected.milliseconds, self.rng)
            ran = self.run(case, out, fault)
            told.append(f"{fault} -> {ran.code}")
            if ran.happened:
                self.tally.faults[kind] += 1
                self.tally.by_case[case.name] += 1
                self.tally.ends[self._end(ran)] += 1
            problems = [*self._said(ran, self._allowed(fault)), *self._left(case, expected, out, ran)]
            self.tally.wrong += [f"{case.name}: {told}: {problem}" for problem in problems]
        ran = self.run(case, out)
        self.tally.resumed += "resuming in" in ran.stderr
        problems = [] if ran.code == 0 else [f"the last run ended with {ran.code}: {ran.stderr}"]
        problems += self._left(case, expected, out, ran)
        beside = sorted(os.listdir(place))
        if beside != ["out"]:
            problems.append(f"at the end there is {beside}")
        self.tally.wrong += [f"{case.name}: {told}, then undisturbed: {problem}" for problem in problems]
        shutil.rmtree(place)

    @staticmethod
    def _end(ran: Ran) -> str:
        if ran.code < 0:
            return f"ended by {signal.Signals(-ran.code).name}"
        ends = {0: "finished all the same", 2: "error and hint", 130: "interrupted, and said so"}
        return ends.get(ran.code, f"exit code {ran.code}")

    @staticmethod
    def _allowed(fault: Fault) -> set[int]:
        """Exit codes; 0 where it came too late, or did no harm."""
        if fault.kind in ("SIGKILL", "torn"):
            return {0, -9}
        return {0, 130, -15, -2} if fault.kind in SIGNALS else {0, 2}

    @staticmethod
    def _said(ran: Ran, allowed: set[int]) -> list[str]:
        """What is wrong with how a run ended."""
        found = []
        if ran.code not in allowed:
            found.append(f"exit code {ran.code}: {ran.stderr}")
        if "Traceback" in ran.stderr:
            found.append(f"a traceback: {ran.stderr}")
        if ran.code == 2:
            lines = [line.partition(":")[0] for line in ran.stderr.splitlines()]
            if lines.count("error") != 1 or lines.count("hint") != 1 or lines[-2:] != ["error", "hint"]:
                found.append(f"not one error and one hint: {ran.stderr}")
        return found

    def _left(self, case: Case, expected: Expected, out: Path, ran: Ran) -> list[str]:
        """What is wrong with what a run left on the disk."""
        found = []
        now = hashes(out)
        now.pop(".qkit-lock", None)  # of a run that was killed after the last rename; the next one removes it
        self.tally.compared += len(now)
        gone = case.replaces and ran.code < 0 and not out.exists()  # between two renames; the next run puts it back
        if now not in (expected.files, expected.earlier) and not gone:
            found.append(f"OUT is neither complete nor absent: {differences(now, expected.files)}")
        if ran.code == 0 and now != expected.files:
            found.append(f"a run that ended well left {differences(now, expected.files)}")
        partial = hashes(out.with_name("out.qkit-partial"))
        for name in partial.keys() & expected.files.keys() - {"qkit_manifest.json"}:
            self.tally.compared += 1
            if partial[name] != expected.files[name]:
                found.append(f"the work folder's {name} has other bytes")
        source = hashes(self.work / "models" / case.model)
        self.tally.compared += len(source)
        if source != self.model(case.model):
            found.append(f"the source is no longer what it was: {differences(source, self.model(case.model))}")
        return found


def differences(now: dict[str, str], then: dict[str, str]) -> str:
    lost, new = sorted(then.keys() - now.keys()), sorted(now.keys() - then.keys())
    other = sorted(name for name in now.keys() & then.keys() if now[name] != then[name])
    return f"missing {lost}, new {new}, other bytes {other}"


def report(tally: Tally, seconds: float, whole: int) -> dict[str, Any]:
    return {
        "faults": sum(tally.faults.values()),
        "by_kind": dict(tally.faults),
        "by_end": dict(tally.ends),
        "by_case": dict(tally.by_case),
        "undisturbed_runs": whole,
        "resumed_from_finished_files": tally.resumed,
        "hashes_compared": tally.compared,
        "wrong": tally.wrong,
        "seconds": round(seconds, 1),
    }


def show(found: dict[str, Any]) -> str:
    lines = []
    for title, key in (("fault", "by_kind"), ("how the run ended", "by_end"), ("conversion", "by_case")):
        rows = sorted(found[key].items())
        lines += [f"| {title} | runs |", "|---|---:|", *(f"| {name} | {n} |" for name, n in rows), ""]
    lines.append(
        f"{found['faults']} faults, {found['hashes_compared']} hashes compared, {len(found['wrong'])} wrong, "
        f"{found['resumed_from_finished_files']} last runs that went on from finished files; {found['seconds']:.0f} s"
    )
    return "\n".join([*lines, *(f"WRONG {problem}" for problem in found["wrong"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="faults that happen, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="conversions by the names in the table")
    parser.add_argument("--work", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    from qkit.hardware.detect import resolve

    for module in (
        "torch",
        "transformers",
        "qkit.cli",
        "qkit.conversion.run",
        "qkit.calibrate.blocks",
        *cases.modules(),
    ):
        importlib.import_module(module)  # once, for all children
    resolve("cpu")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        harness = Harness(Path(scratch), args.seed)
        chosen = [case for case in cases.all_cases() if not args.only or case.name in args.only]
        if not chosen:
            parser.error("no conversion has such a name")
        harness.rng.shuffle(chosen)
        turn = at = 0
        while sum(harness.tally.faults.values()) < args.count:
            kinds = [KINDS[(turn + i) % len(KINDS)] for i in range(harness.rng.choice((1, 1, 2, 3)))]
            turn += len(kinds)
            harness.one(chosen[at % len(chosen)], kinds)
            at += 1
    gc.unfreeze()
    found = report(harness.tally, time.perf_counter() - began, at)
    print(show(found))
    print(json.dumps(found))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
