"""Conversions that are stopped, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

OPTIONS = {"method": "rtn"}


def stop():
    raise KeyboardInterrupt


def interrupted(source: Path, out: Path, midway, **options) -> Path:
    """The work folder of a run that was stopped after its first file."""
    from qkit.conversion.run import convert
    from qkit.conversion.workspace import partial_dir

    midway(stop)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), out, **(options or OPTIONS))
    assert len(list(partial_dir(out).glob("model-*"))) == 1
    return partial_dir(out)


def fails(source: Path, out: Path, match: str, **options) -> Exception:
    from qkit.conversion.run import convert
    from qkit.errors import QkitError

    with pytest.raises(QkitError, match=match) as caught:
        convert(str(source), out, **(options or OPTIONS))
    assert caught.value.hint
    return caught.value
