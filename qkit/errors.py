"""The one exception a user is meant to read."""

from __future__ import annotations


class QkitError(Exception):
    """Bad input, or a limit of the machine: a message and, where there is one, the remedy.

    The command line prints ``error: <message>`` and ``hint: <hint>`` and exits with 2; no traceback.
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message
