"""What is predicted of a model on this machine before it runs, and how far what is measured then lies from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..estimate import engines, speed
from ..estimate.answer import work_of
from ..estimate.loaded import as_loaded
from ..estimate.memory import memory
from ..estimate.rates import Fitted, Setting
from ..estimate.subject import of_described
from ..hardware.detect import local_target

if TYPE_CHECKING:
    from ..hardware.detect import LocalDevice
    from ..hardware.device import Target
    from ..sources.types import Source
    from .types import Memory, Speed

ENGINE = "qkit"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What is going to be measured: speed of `generated` tokens after a prompt in each of `batch` sequences; memory of
    `context` tokens in each of the `largest` batch."""

    prompt: int
    generated: int
    batch: int
    context: int
    largest: int


def before(source: Source, where: LocalDevice, read_gbs: float, asked: Asked, fit: Fitted | None = None) -> Figures:
    """The prediction for a model that is open, from its headers: see `Measured.predicted`.

    read_gbs  at which the device was seen to read memory; on a CPU it is the bandwidth of the roofline
    fit       default: the one that comes with qkit"""
    target = local_target(where, read_gbs)
    kind = where.device_class
    try:
        found = as_loaded(of_described(source), ENGINE, kind)
        held = memory(found.arch, found.weights, target, ENGINE, asked.context, asked.largest, found.dtype)
    except QkitError as error:
        return _unknown(error.message)
    work = work_of(found, ENGINE, found.dtype)
    kernel = engines.kernel_of(found.spec)
    threads = _threads() if kind == "cpu" else None

    def rate(phase: str, generated: int) -> speed.Prediction | None:
        engine = engines.ENGINES[ENGINE]
        setting = Setting(
            engine, engines.release(engine), kernel, engines.library(engine, kernel), target.device, 1, phase,
            work.experts > 0,
        )  # fmt: skip
        return speed.predict(
            work, setting, speed.Load(phase, asked.batch, asked.prompt, generated), threads=threads, fit=fit
        )

    decode, prefill = rate("decode", asked.generated), rate("prefill", 0)
    problem = None
    if decode is None or prefill is None:
        problem = f"the catalogue has no bandwidth, or no rate, of {target.device.name}: its speed is not predicted"
    tokens = asked.batch * asked.prompt
    return {
        "decode": _rate(decode),
        "prefill": _rate(prefill),
        "first": prefill
        and _open("seconds", tokens / prefill.tokens_per_s, low=tokens / prefill.high, high=tokens / prefill.low),
        "memory": {**_open("total", held.total), "parts": {t.name: t.nbytes for t in held.terms}},
        "weights": _open("bytes", held.of("weights")),
        "kv_cache": _open("bytes", held.of("KV cache")),
        "basis": {
            **({"speed": decode.basis, "bandwidth": _bandwidth(target, read_gbs, kind)} if decode else {}),
            **{t.name: t.basis for t in held.terms},
            "weights": found.basis,
        },
        "problem": problem,
    }


def beside(predicted: Figures, speeds: Sequence[Speed], used: Memory) -> Figures:
    """The prediction with what was measured of the same, and error: predicted / measured - 1; None where it was not."""
    first = speeds[0] if speeds else None
    measured: dict[str, float | None] = {
        "decode": first.decode_tps if first else None,
        "prefill": first.prefill_tps if first else None,
        "first": first.ttft_median if first else None,
        "memory": used.total,
        "weights": used.weights,
        "kv_cache": used.kv_cache,
    }
    return {**predicted, **{name: _against(predicted[name], value) for name, value in measured.items()}}


def _against(found: Mapping[str, Any] | None, measured: float | None) -> Figures | None:
    if found is None:
        return None
    value = next(found[name] for name in ("tokens_per_s", "seconds", "total", "bytes") if name in found)
    return {**found, "measured": measured, "error": value / measured - 1 if measured else None}


def _open(unit: str, value: float, **more: float) -> Figures:
    return {unit: value, **more, "measured": None, "error": None}


def _rate(found: speed.Prediction | None) -> Figures | None:
    return None if found is None else _open("tokens_per_s", found.tokens_per_s, low=found.low, high=found.high)


def _unknown(why: str) -> Figures:
    parts = ("decode", "prefill", "first", "memory", "weights", "kv_cache")
    return {**dict.fromkeys(parts), "basis": {}, "problem": why}


def _bandwidth(target: Target, read_gbs: float, kind: str) -> str:
    if kind == "cpu":
        return f"{read_gbs:.1f} GB/s, read here"
    return f"{target.device.bandwidth_gbs:g} GB/s of the catalogue"


def _threads() -> int:
    import torch

    return torch.get_num_threads()
