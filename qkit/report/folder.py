"""Where a report is written: its folder, its three files, each whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import QkitError

NAMES = ("profile.json", "profile.md", "profile.html")


def out_folder(out: str | None, models: Sequence[str]) -> Path:
    """The folder of a report on `models`, made: `out`, or qkit-profile/MODEL. Raises QkitError where it cannot be."""
    first = Path(models[0].rstrip("/"))
    name = (first.parent if first.name == "config.json" else first).name.removesuffix(".gguf") or "model"
    name += f"-and-{len(models) - 1}-more" if len(models) > 1 else ""
    folder = Path(out) if out else Path("qkit-profile") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QkitError(
            f"the report's folder {folder} cannot be made: {error.strerror}", "choose another with -o"
        ) from None
    return folder


def save(folder: Path, bodies: Sequence[str], names: Sequence[str] = NAMES) -> list[Path]:
    """Write the bodies of the names. Raises QkitError where that fails."""
    from ..storage.local import LocalStore
    from ..storage.writer import write_file

    for name, body in zip(names, bodies, strict=True):
        write_file(LocalStore(folder), name, body.encode())
    return [folder / name for name in names]
