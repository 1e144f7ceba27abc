"""The one exception a user is meant to read."""

from __future__ import annotations

_LONGEST = 4000  # characters: a name in a file may have a million


def _within(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text)} characters)"


class QkitError(Exception):
    """Bad input, or a limit of the machine: a message and, where there is one, the remedy.

    The command line prints ``error: <message>`` and ``hint: <hint>`` and exits with 2; no traceback.
    """

    def __init__(self, message: str, hint: str | None = None):
        self.message = _within(message)
        super().__init__(self.message)
        self.hint = hint and _within(hint)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message
