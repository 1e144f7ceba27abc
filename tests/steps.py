"""Whether a model's forwards were the fast decoding step."""

from __future__ import annotations

from typing import Any

from qkit.runtime import decoder


def steps_taken(monkeypatch: Any) -> list[bool]:
    """Grows by whether the step was taken, at every forward."""
    taken: list[bool] = []
    step = decoder._Runner.step

    def watched(self: Any, *args: Any) -> Any:
        out = step(self, *args)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(decoder._Runner, "step", watched)
    return taken
