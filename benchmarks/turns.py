"""Processes that are measured in turns: each answers JSON lines, and is stopped while the others have the machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Waiting:
    """A process that is stopped (SIGSTOP) until it is asked: threads of engines poll while they wait.

    Its answers are the lines of stdout that begin with `prefix`; all else goes to the log."""

    def __init__(
        self, name: str, command: Sequence[str | Path], env: Mapping[str, str] | None, log: Path, prefix: str = ""
    ):
        self.name, self._prefix = name, prefix
        self._log = open(log, "a")  # noqa: SIM115  # open as long as the process
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            start_new_session=True,
        )  # fmt: skip

    def first(self) -> dict[str, Any]:
        """What it says by itself, when it is ready."""
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """Ends it, also where it has ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(self._prefix):
                return json.loads(line.removeprefix(self._prefix))  # type: ignore[no-any-return]
            self._log.write(line)
        self.close()
        raise SystemExit(f"{self.name} ended: see {self._log.name}")
