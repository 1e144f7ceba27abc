"""What a converted folder holds besides its weights: config, index, sidecars, model card; all of it hashed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .card import card
from .containers import CONTAINERS

if TYPE_CHECKING:
    from ..sources.types import Source
    from .output import Work
    from .plan import Plan

CARD = "README.md"


def companion_names(plan: Plan, source: Source) -> list[str]:
    """The files that `write_companions` writes."""
    container = CONTAINERS[plan.fmt.container]
    sidecars = (sidecar.name for sidecar in container.sidecars(source))
    return sorted({*container.companions(plan, source, None), CARD, *sidecars})


def write_companions(plan: Plan, source: Source, work: Work) -> None:
    """Write everything but the weights into the workspace and note it in the manifest."""
    from ..storage.manifest import file_entry
    from ..storage.writer import write_file

    container = CONTAINERS[plan.fmt.container]
    files = container.companions(plan, source, work.manifest.identity["calibration"])
    files[CARD] = card(plan, source, work.manifest).encode()
    for sidecar in container.sidecars(source):
        if sidecar.name not in files:
            files[sidecar.name] = sidecar.read()
    work.note(files={name: file_entry(write_file(work.store, name, data)) for name, data in sorted(files.items())})


def complete(work: Work) -> None:
    """Mark the folder complete: its last change before it gets its name."""
    work.reveal()
    work.manifest.complete = True
    work.save()
