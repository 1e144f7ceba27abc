"""Progress where stderr is a file, with a clock of our own."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

import pytest

from qkit import progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


@pytest.fixture
def log(capsys):
    return lambda: capsys.readouterr().err.splitlines()


def test_a_line_every_ten_seconds_and_one_at_the_end(clock, log):
    with progress.track("writing", 1e9, "bytes") as advance:
        for _ in range(100):
            clock.now += 1
            advance(1e7)
    lines = log()
    assert len(lines) == 10
    assert lines[0] == "writing: 10 %, 100.0 MB of 1.0 GB, 10.0 MB/s, about 90 s left"
    assert lines[-2].startswith("writing: 90 %") and lines[-2].endswith("about 10 s left")
    assert lines[-1] == "writing: done, 1.0 GB of 1.0 GB in 1 min 40 s, 10.0 MB/s"


def test_steps_that_take_long_are_said_one_by_one(clock, log):
    with progress.track("gptq", 3, "blocks") as advance:
        for _ in range(3):
            clock.now += 1800
            advance(1)
    assert log() == [
        "gptq: 33 %, 1 of 3 blocks, 30 min 0 s each, about 60 min 0 s left",
        "gptq: 67 %, 2 of 3 blocks, 30 min 0 s each, about 30 min 0 s left",
        "gptq: done, 3 of 3 blocks in 90 min 0 s, 30 min 0 s each",
    ]


def test_short_phases_and_failures_are_not_said_to_be_done(clock, log):
    with progress.track("quick", 2) as advance:
        clock.now += 2
        advance(2)
    with pytest.raises(ValueError, match="broken"), progress.track("failing", 2) as advance:
        clock.now += 60
        raise ValueError("broken")
    with progress.track("nothing", 0) as advance:
        advance(1)
    assert log() == []


def test_threads_may_advance(clock, log):
    with progress.track("together", 4000) as advance:
        threads = [threading.Thread(target=lambda: [advance(1) for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        clock.now += 60
    assert log() == ["together: done, 4000 of 4000 steps in 60 s, 66.7 steps/s"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals to make")
@pytest.mark.parametrize(("variables", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, None)])
def test_a_terminal(monkeypatch, variables, colour):
    """colour None: no bar at all."""
    for name, value in {"TERM": "xterm-256color", **variables}.items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in variables:
        monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress.track("writing", 2) as advance:
            advance(2)
    shown = ""
    with suppress(OSError):  # the end of a terminal that nobody holds open
        while more := os.read(ours, 1 << 16):
            shown += more.decode()
    os.close(ours)
    assert ("writing" in shown) == (colour is not None)
    assert ("\x1b[38;5" in shown or "\x1b[35m" in shown or "\x1b[32m" in shown) == bool(colour)
