"""The check after writing: what is on the disk is what was planned, and dequantizes to what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import QkitError
from ..models.families import module_of
from ..progress import track
from .execute import weight_error

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..sources.types import Source
    from .plan import Plan, TensorPlan
    from .workspace import Workspace

SAMPLES = 8  # weights measured again against the source: enough to catch a wrong layout, cheap enough to be default
_HINT = "run the same command again: it keeps what is right and writes the rest anew; if it repeats, check the disk"


def verify_result(plan: Plan, source: Source, fmt: Format, work: Workspace) -> None:
    """Raises QkitError unless every hash, every tensor's type and shape, and a sample of errors agree.

    The sampled weights are read back, unpacked, dequantized and compared with the source: their error must be
    the one noted while quantizing. Files that do not agree are forgotten, so that the same command repairs them."""
    from ..sources.folder import FolderSource

    with track("verifying", 1, "steps") as advance:
        damaged = {name: why for name, why in _damaged(work).items()}
        advance(1)
    if damaged:
        work.drop(damaged)
        raise QkitError(f"verification failed: {next(iter(damaged.values()))}", _HINT)
    written = FolderSource(work.folder)
    files = {name: shard.file for shard in plan.shards for t in shard.tensors for name, _ in t.outputs}
    for name, meta in ((name, meta) for t in plan.tensors for name, meta in t.outputs):
        if written.meta(name) != meta:
            work.drop([files[name]])
            raise QkitError(f"verification failed: {name} is {written.meta(name)}, planned was {meta}", _HINT)
    for t in sample([t for t in plan.tensors if t.scheme is not None]):
        assert t.scheme is not None
        prefix = module_of(t.name) + "."
        tensors = {name.removeprefix(prefix): written.read(name) for name, _ in t.outputs}
        error = weight_error(source.read(t.name), fmt.unpack(tensors, t.scheme))
        noted = work.manifest.tensors[t.name]["weight_error"]
        if abs(error - noted) > 1e-4 * max(noted, 1e-3):
            work.drop({files[name] for name, _ in t.outputs})
            raise QkitError(
                f"verification failed: {t.name} reads back with error {error:.6g}, noted was {noted:.6g}",
                "if the source changed during the run, leave it alone and use --restart; else " + _HINT,
            )


def _damaged(work: Workspace) -> dict[str, str]:
    """Name -> what is wrong, for each file that is not what the manifest says."""
    problems = {}
    for problem in work.manifest.verify(work.folder):
        name = problem.partition(": ")[0]
        if name in work.manifest.files:
            problems[name] = problem
    return problems


def sample(tensors: list[TensorPlan], count: int = SAMPLES) -> list[TensorPlan]:
    """Tensors of every kind (q_proj, down_proj, ...), from the first block to the last: at least `count` where there
    are as many, and at least one of each kind."""
    kinds: dict[str, list[TensorPlan]] = {}
    for t in tensors:
        kinds.setdefault(module_of(t.name).rpartition(".")[2], []).append(t)
    each = -(-count // max(1, len(kinds)))
    chosen = []
    for i, members in enumerate(kinds.values()):
        for k in range(min(each, len(members))):
            at = (i + k * len(kinds)) / max(1, len(kinds) * each - 1)  # 0 .. 1 over all that are chosen
            chosen.append(members[round(at * (len(members) - 1))])
    return chosen
