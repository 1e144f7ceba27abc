"""Progress, on stderr: a bar with an ETA on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import units
from .untrusted import printable

EVERY = 10.0  # seconds between the lines of a log
SHORT = 3.0  # a phase that took less is not worth a line


def notify(message: str) -> None:
    """One line for the user, on stderr: stdout belongs to the data."""
    print(printable(message), file=sys.stderr, flush=True)


@contextmanager
def track(description: str, total: float, unit: str = "steps") -> Iterator[Callable[[float], None]]:
    """Yields `advance(amount)`, which any thread may call. unit "bytes" shows sizes and a rate."""
    if total <= 0:
        yield lambda amount: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(description, total, unit) as advance:
            yield advance
    else:
        lines = _Lines(description, total, unit)
        yield lines.advance
        lines.finish()


@contextmanager
def _bar(description: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    """rich's bar; it leaves colours out where NO_COLOR is set."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *amounts, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.update(task, advance=amount)


class _Lines:
    """A phase as lines of a log. Time is looked at when something advances: no thread of its own."""

    def __init__(self, description: str, total: float, unit: str):
        self.description, self.total, self.unit = description, total, unit
        self.done = 0.0
        self.started = self.said = time.monotonic()
        self.lock = threading.Lock()

    def advance(self, amount: float) -> None:
        with self.lock:
            self.done += amount
            now = time.monotonic()
            if now - self.said < EVERY or self.done >= self.total:
                return
            self.said = now
            elapsed = now - self.started
            line = f"{self.description}: {100 * self.done / self.total:.0f} %, {self._amount()}{self._rate(elapsed)}"
            if self.done > 0:
                line += f", about {units.duration(elapsed * (self.total / self.done - 1))} left"
            notify(line)

    def finish(self) -> None:
        elapsed = time.monotonic() - self.started
        if elapsed >= SHORT:
            notify(f"{self.description}: done, {self._amount()} in {units.duration(elapsed)}{self._rate(elapsed)}")

    def _amount(self) -> str:
        if self.unit == "bytes":
            return f"{units.size(self.done)} of {units.size(self.total)}"
        return f"{self.done:g} of {self.total:g} {self.unit}"

    def _rate(self, elapsed: float) -> str:
        if self.unit == "bytes":
            return f", {units.size(self.done / elapsed)}/s"
        each = elapsed / self.done if self.done else 0.0
        if each >= SHORT:
            return f", {units.duration(each)} each"
        return f", {1 / each:.1f} {self.unit}/s" if each else ""
