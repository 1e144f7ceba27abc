"""The one data path: Source -> Plan -> (statistics, by block) -> shards -> config and card -> verify -> rename."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import units
from ..errors import QkitError
from ..progress import say, track
from .plan import CALIBRATED, Options, Plan, make_plan, partial_dir

if TYPE_CHECKING:
    import torch

    from ..formats.base import Format
    from ..sources.types import Source
    from ..storage.manifest import Manifest
    from ..text.windows import CalibrationSet
    from .plan import Shard, TensorPlan


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` did. seconds and peak_memory (resident, bytes) are measured; None after a dry run.

    fallbacks: "weight name: reason" for each layer that did not get the method asked for."""

    plan: Plan
    out: Path
    seconds: float | None = None
    peak_memory: int | None = None
    fallbacks: tuple[str, ...] = ()
    resumed: bool = False
    already_done: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.as_dict(),
            "out": str(self.out),
            "seconds_measured": self.seconds,
            "peak_memory_measured_bytes": self.peak_memory,
            "fallbacks": list(self.fallbacks),
            "resumed": self.resumed,
            "already_done": self.already_done,
        }


def convert(
    source: str,
    out: str | os.PathLike[str],
    *,
    format: str = "compressed-tensors",
    scheme: str = "w4a16",
    method: str | None = None,
    group_size: int | None = None,
    clip_search: bool = False,
    calib: str | None = None,
    calib_samples: int = 64,
    calib_len: int = 512,
    device: str = "auto",
    max_memory: int | None = None,
    lora: str | None = None,
    skip: Sequence[str] = (),
    dry_run: bool = False,
    restart: bool = False,
    verify: bool = True,
) -> ConvertResult:
    """Quantize a checkpoint into the folder `out`, which appears, complete, as the last step.

    source      folder of safetensors, .gguf file, Hub id or "demo"
    method      "rtn" or "gptq"; None: gptq below 8 bits, rtn at 8
    group_size  input channels per scale, 0 for one scale per output channel; None: the largest of 128, 64, 32
                that divides every quantized layer
    max_memory  bytes of resident memory to plan for
    restart     discard an interrupted run or an earlier result of qkit at `out`

    The same source, options and version give byte-identical files. An interrupted run continues when called
    again with the same arguments. Raises QkitError for bad input, before any tensor is read.
    """
    from ..sources import open_source

    started = time.perf_counter()
    opened = open_source(source, lora=lora)
    options = Options(
        format=format,
        scheme=scheme,
        method=method,
        group_size=group_size,
        clip_search=clip_search,
        calib=calib,
        calib_samples=calib_samples,
        calib_len=calib_len,
        device=device,
        max_memory=max_memory,
        skip=tuple(skip),
    )
    plan = make_plan(opened, Path(out), options)
    if dry_run:
        return ConvertResult(plan, plan.out)
    calibration = _calibration(plan, opened) if plan.method in CALIBRATED else None
    identity = _identity(plan, opened, calibration)
    finished = _finished(plan.out, identity, restart)
    if finished is not None:
        return ConvertResult(plan, plan.out, fallbacks=_fallbacks(finished), already_done=True)

    with _workspace(plan.out, identity, restart) as (folder, manifest):
        resumed = bool(manifest.files) or (folder / "parts").is_dir()
        if resumed:
            say(f"resuming in {folder}")
        _run(plan, opened, calibration, folder, manifest, verify)
        _publish(folder, plan.out)
    return ConvertResult(
        plan, plan.out, time.perf_counter() - started, peak_memory(), _fallbacks(manifest), resumed
    )  # fmt: skip


def _run(
    plan: Plan, source: Source, calibration: CalibrationSet | None, folder: Path, manifest: Manifest, verify: bool
) -> None:
    from .. import formats
    from . import finish
    from .verify import verify_result

    fmt = formats.get(plan.options.format)
    produce: Any = _Direct(source, fmt, plan)
    if calibration is not None:
        from .parts import quantize_into_parts

        produce = quantize_into_parts(plan, source, fmt, calibration.tokens, folder / "parts", _device(plan))
    with track("writing", plan.bytes_in, "bytes") as advance:
        for shard in plan.shards:
            if _already_written(folder, manifest, shard.file):
                advance(sum(t.meta.nbytes for t in shard.tensors))
            else:
                _write_shard(shard, produce, folder, manifest, plan.workers, advance)
    finish.write_companions(plan, source, fmt, folder, manifest)
    if verify:
        verify_result(plan, source, fmt, folder, manifest)
    shutil.rmtree(folder / "parts", ignore_errors=True)


class _Direct:
    """Produces a tensor's outputs from the source alone: quantize by rounding, or pass through."""

    def __init__(self, source: Source, fmt: Format, plan: Plan):
        self.source, self.fmt, self.clip_search = source, fmt, plan.options.clip_search

    def __call__(self, t: TensorPlan) -> tuple[list[torch.Tensor], dict[str, Any] | None]:
        from ..methods import rtn

        weight = self.source.read(t.name)
        if t.scheme is None:
            check_finite(t.name, weight)
            return [weight], None
        try:
            q, error = rtn.quantize_with_error(weight, t.scheme, self.clip_search)
        except QkitError as e:
            raise QkitError(f"{t.name}: {e.message}", e.hint) from e
        return list(self.fmt.pack(q).values()), record(t, "rtn", error)


def record(t: TensorPlan, method: str, weight_error: float, **more: Any) -> dict[str, Any]:
    """The manifest's entry for a quantized weight. weight_error: ||W - Wq|| / ||W||, Frobenius."""
    assert t.scheme is not None
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in more.items() if v is not None}
    return {
        "scheme": asdict(t.scheme),
        "method": method,
        "shape": list(t.meta.shape),
        "weight_error": float(f"{weight_error:.6g}"),
        **rounded,
    }


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises QkitError naming the tensor where it holds NaN or infinity."""
    import torch

    if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
        low, high = torch.aminmax(tensor)  # NaN wins both, infinity one; unlike isfinite it makes no copy
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            hint = "the checkpoint is damaged: fetch or train it again"
            raise QkitError(f"{name} contains NaN or infinite values", hint)


def _write_shard(shard: Shard, produce: Any, folder: Path, manifest: Manifest, workers: int, advance: Any) -> None:
    from ..storage.manifest import file_entry
    from ..storage.writer import write_safetensors

    entries = [output for t in shard.tensors for output in t.outputs]
    records: dict[str, dict[str, Any]] = {}

    def stream() -> Iterator[torch.Tensor]:
        for t, (tensors, entry) in zip(shard.tensors, in_order(produce, shard.tensors, workers), strict=True):
            if entry is not None:
                records[t.name] = entry
            yield from tensors
            advance(t.meta.nbytes)

    digest = write_safetensors(folder / shard.file, entries, stream())
    manifest.tensors.update(records)
    manifest.files[shard.file] = file_entry(digest)
    manifest.save(folder)


def in_order(produce: Any, items: Sequence[Any], workers: int) -> Iterator[Any]:
    """produce(item) for each item, `workers` at a time, yielded in order; bounded, so memory is too."""
    from collections import deque
    from concurrent.futures import Future, ThreadPoolExecutor

    pool = ThreadPoolExecutor(workers, thread_name_prefix="qkit")
    pending: deque[Future[Any]] = deque()
    try:
        for item in items:
            if len(pending) >= workers:
                yield pending.popleft().result()
            pending.append(pool.submit(produce, item))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _already_written(folder: Path, manifest: Manifest, file: str) -> bool:
    entry = manifest.files.get(file)
    path = folder / file
    return entry is not None and path.is_file() and path.stat().st_size == entry["bytes"]


def _calibration(plan: Plan, source: Source) -> CalibrationSet:
    from ..runtime import load_tokenizer
    from ..text.windows import calibration_tokens

    o = plan.options
    calibration = calibration_tokens(o.calib, load_tokenizer(source), o.calib_samples, o.calib_len)
    say(f"calibrating on {calibration.tokens.shape[0]} x {calibration.tokens.shape[1]} tokens of {calibration.name}")
    if calibration.note:
        say(calibration.note)
    return calibration


def _device(plan: Plan) -> str:
    import torch

    if plan.options.device != "auto":
        return plan.options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _identity(plan: Plan, source: Source, calibration: CalibrationSet | None) -> dict[str, Any]:
    """Everything that decides the output's bytes; no paths, times or machine names."""
    from .. import __version__

    identity: dict[str, Any] = {
        "qkit": __version__,
        "source": {"base_model": source.base_model, "fingerprint": source.fingerprint},
        "format": plan.options.format,
        "method": plan.method,
        "clip_search": plan.options.clip_search,
        "scheme": asdict(plan.scheme) if plan.scheme else None,
        "skip": list(plan.options.skip),
        "calibration": None,
    }
    if calibration is not None:
        import torch
        import transformers

        # Matmuls may round differently in another release, on another device or with another thread count.
        identity["compute"] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": _device(plan).partition(":")[0],
            "threads": torch.get_num_threads(),
        }
        identity["calibration"] = {
            "name": calibration.name,
            "sha256": calibration.sha256,
            "samples": calibration.tokens.shape[0],
            "length": calibration.tokens.shape[1],
            "sketch": calibration.sketch,
        }
    return identity


def _finished(out: Path, identity: dict[str, Any], restart: bool) -> Manifest | None:
    """The manifest of a finished, identical conversion at `out`; refuses whatever else is there."""
    from ..storage.manifest import MANIFEST, Manifest

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise QkitError(f"{out} exists and is not a folder", "choose another name with -o")
    if not (out / MANIFEST).is_file():
        raise QkitError(f"{out} exists and was not written by qkit", "choose another folder with -o")
    if restart:
        return None
    manifest = Manifest.load(out)
    if manifest.complete and manifest.identity == identity:
        return manifest
    raise QkitError(f"{out} holds another conversion", "choose another folder with -o, or replace it with --restart")


@contextmanager
def _workspace(out: Path, identity: dict[str, Any], restart: bool) -> Iterator[tuple[Path, Manifest]]:
    """The folder of the work in progress and its manifest, locked against a second run."""
    from ..storage.manifest import MANIFEST, Manifest
    from ..storage.writer import remove_temporaries

    folder = partial_dir(out)
    with _system_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  # held until the run ends
    try:
        if not _lock(lock):
            raise QkitError(f"another qkit convert is writing {out}", "wait for it, or choose another folder with -o")
        ours = (folder / MANIFEST).is_file()
        strangers = [p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.startswith(".")]
        if strangers and not ours:
            raise QkitError(f"{folder} holds files that are not qkit's ({strangers[0]})", "move them away")
        manifest = Manifest.load(folder) if ours else None
        if manifest is not None and manifest.identity != identity and not restart:
            raise QkitError(
                f"{folder} holds an interrupted run with {_difference(manifest.identity, identity)}",
                "repeat that command to finish it, or discard it with --restart",
            )
        if restart and ours:
            for path in folder.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            manifest = None
        if manifest is None:
            manifest = Manifest(identity, {}, {}, False)
            manifest.save(folder)
        for place in (folder, folder / "parts"):  # what a killed run left
            remove_temporaries(place)
        yield folder, manifest
    finally:
        lock.close()


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    from ..storage.files import os_error

    try:
        yield
    except OSError as error:
        raise os_error("write", path, error) from error


def _lock(handle: Any) -> bool:
    """Whether this process now holds the lock; released by the system however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; two runs at once are the user's risk there
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    key = next((k for k in new if old.get(k) != new.get(k)), "version")
    if key == "source":
        return "another source"
    before = old.get(key)
    return f"another {key}" + (f" ({before})" if isinstance(before, str | bool | int) else "")


def _publish(folder: Path, out: Path) -> None:
    """Give the finished folder its final name: one rename."""
    old = out.with_name(out.name + ".qkit-old")
    with _system_errors(out):
        (folder / ".lock").unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(folder, out)
        except BaseException:
            if old.exists():
                os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _fallbacks(manifest: Manifest) -> tuple[str, ...]:
    return tuple(f"{name}: {t['fallback']}" for name, t in manifest.tensors.items() if t.get("fallback"))


def peak_memory() -> int | None:
    """Largest resident size of this process so far, bytes; None where the system does not say."""
    with suppress(ImportError):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None


def summary(result: ConvertResult) -> str:
    """The last words of a conversion."""
    plan = result.plan
    lines = [
        f"{result.out}: {units.size(plan.bytes_in)} -> {units.size(plan.bytes_out)}, "
        f"{plan.bits_per_weight:.2f} bits per weight"
    ]
    if result.already_done:
        lines.append("already converted with the same source, options and version: nothing to do")
    elif result.seconds is not None:
        peak = f", peak memory {units.size(result.peak_memory)}" if result.peak_memory else ""
        lines.append(f"took {units.duration(result.seconds)}{peak} (measured)")
    if result.fallbacks:
        lines.append(f"WARNING: {len(result.fallbacks)} layer(s) fell back to rounding:")
        lines += [f"  {f}" for f in result.fallbacks]
    return "\n".join(lines)
