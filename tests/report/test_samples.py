"""The committed reports are what their commands wrote: whole, valid, small, and listed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from qkit.report import schema
from qkit.report.folder import NAMES

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "profiles" / "reports"
FOLDERS = sorted(path.name for path in REPORTS.iterdir() if path.is_dir())
COMMANDS = [shlex.split(c) for c in re.findall(r"`(qkit profile [^`]+)`", (REPORTS / "README.md").read_text())]


def parts(command: list[str]) -> tuple[str, dict[str, tuple[str, ...]]]:
    """(model, option -> values): whatever their order and the short form of -o."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for word in command[2:]:
        if word.startswith("-"):
            name = {"-o": "--out"}.get(word, word)
            found[name] = []
        else:
            found[name].append(word)
    return found.pop("")[0], {key: tuple(values) for key, values in found.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_report_is_whole_and_valid(name):
    folder = REPORTS / name
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    document = json.loads((folder / "profile.json").read_text())
    assert schema.problems(document) == [] and document["passed"]
    assert document["provenance"]["date"][:16] in (folder / "profile.html").read_text()
    command = parts(shlex.split(document["provenance"]["command"]))
    assert command in [parts(each) for each in COMMANDS]
    assert document["out"] == f"profiles/reports/{name}"


def test_all_are_listed_made_and_small():
    assert {Path(parts(c)[1]["--out"][0]).name for c in COMMANDS} == set(FOLDERS) and len(FOLDERS) == len(COMMANDS) >= 4
    made = (ROOT / "Makefile").read_text().replace("$(BIN)/", "").replace("$(REPORTS)", "profiles/reports")
    assert [
        parts(shlex.split(line))
        for line in re.findall(r"^\t(qkit profile .* -o profiles/reports/.*)$", made, re.MULTILINE)
    ] == [parts(c) for c in COMMANDS]
    assert sum(path.stat().st_size for path in REPORTS.rglob("*") if path.is_file()) < 1_000_000
    for command in COMMANDS:
        model = parts(command)[0]
        assert model.startswith("demo-out/") or (ROOT / model / "config.json").is_file()
    links = re.findall(r"\]\(([^)]+)\)", (REPORTS / "README.md").read_text())
    assert links and all((REPORTS / link).exists() for link in links)
