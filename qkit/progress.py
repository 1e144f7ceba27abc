"""Progress with an ETA on a terminal, silence elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(message: str) -> None:
    """One line for the user, on stderr: stdout belongs to the data."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def track(description: str, total: float, unit: str = "steps") -> Iterator[Callable[[float], None]]:
    """Yields `advance(amount)`. unit "bytes" shows sizes and a rate.

    Nothing is drawn where stderr is not a terminal."""
    if not sys.stderr.isatty() or total <= 0:
        yield lambda amount: None
        return
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
