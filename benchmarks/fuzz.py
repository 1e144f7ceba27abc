"""Every parser of files that come from elsewhere, fed with files that are wrong.

    python benchmarks/fuzz.py TARGET|all [--minutes 60] [--seed 1] [--work DIR]

A target (`fuzzing/targets.py`) opens a folder of small files by the functions that users call. Each run takes a case
that is in order, or one that has shown something new, and changes it by its structure: values, keys and entries of
JSON; types, shapes and names of tensors; pairs of a GGUF file; lines, words, bytes; what lies in the folder in a file's
place. What a case leads to is told by the lines of qkit that an error passed through; a case with lines that are new is
kept and changed further.

Right is: it is read, or a QkitError whose message and hint can be printed. Anything else is a find: another exception,
more than 5 s of processor time, more than 512 MiB of memory beside what the process had, a process that dies or hangs.
Each find is kept once, with its files and its traceback, under DIR/finds; `--replay FOLDER` runs one again. Targets get
equal time, each in a process of its own. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzzing.targets import TARGETS

STUCK = 60  # seconds without a run that has ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=60, help="of all targets together (default 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where finds are kept (default: a new folder)")
    parser.add_argument("--replay", type=Path, help="a find's folder: run it once, with a traceback")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # seconds: this is the process of one target
    o = parser.parse_args()
    work = o.work or Path(tempfile.mkdtemp(prefix="qkit-fuzz-"))
    work.mkdir(parents=True, exist_ok=True)
    if o.replay or o.worker:
        from fuzzing import worker

        if o.replay:
            return worker.replay(TARGETS[o.target], o.replay)
        worker.run(o.target, o.worker, o.seed, work)
        return 0
    names = list(TARGETS) if o.target == "all" else [o.target]
    rows = []
    for name in names:
        rows.append(fuzz(name, 60 * o.minutes / len(names), o.seed, work))
        print(
            f"{name:12} {rows[-1]['runs']:9,} runs  {rows[-1]['paths']:5} paths  {rows[-1]['finds']:3} finds",
            flush=True,
        )
    total = {
        "seed": o.seed,
        "work": str(work),
        "runs": sum(r["runs"] for r in rows),
        "finds": sum(r["finds"] for r in rows),
    }
    print(json.dumps({**total, "targets": rows}))
    return 1 if total["finds"] else 0


def fuzz(name: str, seconds: float, seed: int, work: Path) -> dict[str, Any]:
    """One target for a time, in processes that are started again where they die."""
    until, runs, paths = time.monotonic() + seconds, 0, 0
    while (left := until - time.monotonic()) > 5 or not runs:
        state = work / f"{name}.state"
        state.unlink(missing_ok=True)
        command = [
            sys.executable,
            __file__,
            name,
            "--worker",
            str(max(left, 5)),
            "--seed",
            str(seed),
            "--work",
            str(work),
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "HF_HUB_OFFLINE": "1",
            "TRITON_INTERPRET": "1",
        }
        with open(work / f"{name}.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        problem = watch(process, state, left)
        found = json.loads(state.read_text()) if state.exists() else {"runs": 0, "paths": 0}
        runs, paths = runs + found["runs"], max(paths, found["paths"])
        if problem is None:
            break
        if not state.exists():
            raise SystemExit(f"{name}: its seeds are not read: see {work}/{name}.log")
        keep(work, name, problem)
        seed += 1
    shutil.rmtree(work / name, ignore_errors=True)
    return {"target": name, "runs": runs, "paths": paths, "finds": len(list((work / "finds").glob(f"{name}-*")))}


def watch(process: subprocess.Popen[bytes], state: Path, left: float) -> str | None:
    """What became of a target's process: None where it ended well, else how it died."""
    begun = seen = time.monotonic()
    last = 0.0
    while process.poll() is None:
        time.sleep(0.5)
        now = state.stat().st_mtime if state.exists() else last
        seen, last = (time.monotonic(), now) if now != last else (seen, last)
        if time.monotonic() - seen > STUCK + (120 if not last else 0) and time.monotonic() - begun > STUCK:
            process.kill()
            process.wait()
            return "hangs"
    return None if process.returncode == 0 else f"dies with {process.returncode}"


def keep(work: Path, name: str, problem: str) -> None:
    """The case that a process died of."""
    place = work / "finds" / f"{name}-{problem.replace(' ', '-')}-{len(list((work / 'finds').glob('*'))):03}"
    shutil.copytree(work / name / "case", place, symlinks=True, ignore=_only_files)
    (place / "FIND.txt").write_text(f"{problem}; the log is {work}/{name}.log\n")


def _only_files(folder: str, names: list[str]) -> list[str]:
    return [
        n for n in names if not (Path(folder, n).is_file() or Path(folder, n).is_dir() or Path(folder, n).is_symlink())
    ]


if __name__ == "__main__":
    sys.exit(main())
