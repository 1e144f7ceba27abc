"""Tokens per second, predicted, with an interval and its basis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..hardware.device import Device
from . import roofline
from .engines import Engine
from .rates import Fitted, Setting, fitted, rates
from .roofline import Ceilings, Manner
from .traffic import Traffic

Z = 1.645  # standard deviations on both sides: nine in ten
_STEP = 1e-4
_SHORT = 64  # tokens of a prompt, and of an answer, whose length is not told
# A thread of a CPU: bytes/s that it can ask memory for, and float32 operations/s of its vector units.
_THREAD_BANDWIDTH, _THREAD_PEAK = 22e9, 0.15e12


@dataclass(frozen=True)
class Load:
    """What is asked of an engine.

    phase       "decode": new tokens a second, over all sequences; "prefill": tokens of prompts a second
    sequences   that run at once; None: as many as fit
    prompt, generated  tokens; None: not told, taken as short
    whole       of "decode": the prompt's time counts too
    micro       of "prefill": the prompt of one sequence goes through in passes of `sequences` tokens, after `generated`
                tokens that are there already
    """

    phase: str = "decode"
    sequences: float | None = 1
    prompt: int | None = None
    generated: int | None = None
    whole: bool = False
    micro: bool = False

    @property
    def kind(self) -> str:
        """Of figure, to which noise belongs."""
        return "full load" if self.sequences is None else self.phase


@dataclass(frozen=True)
class Prediction:
    """tokens_per_s with the interval [low, high] that holds nine in ten; basis: what it rests on.

    bound: "memory" or "compute", whichever takes longer; sequences: those that run."""

    tokens_per_s: float
    low: float
    high: float
    bound: str
    basis: str
    sequences: float


def ceilings(device: Device, count: int, kernel: str, engine: Engine, threads: int | None = None) -> Ceilings | None:
    """What the device could do for this kernel; None where the catalogue does not say enough."""
    if device.bandwidth_gbs is None:
        return None
    bandwidth = device.bandwidth_gbs * 1e9
    if device.kind == "cpu":
        if threads:
            bandwidth = min(bandwidth, threads * _THREAD_BANDWIDTH)
        peak = device.fp32_tflops * 1e12 if device.fp32_tflops else bandwidth / _THREAD_BANDWIDTH * _THREAD_PEAK
        peak = min(peak, threads * _THREAD_PEAK) if threads else peak
        return Ceilings(bandwidth, peak, peak, count)
    # A card whose 16-bit rate is a token one (GTX 10, P40) computes in float32.
    plain = max(device.fp16_tflops or device.bf16_tflops or 0.0, device.fp32_tflops or 0.0)
    if not plain:
        return None
    fast = {
        "w8a8": device.int8_tops,
        "w4a8": device.int8_tops,
        "llm.int8": device.int8_tops,
        "fp8": device.fp8_tflops,
        "nvfp4": device.fp4_tflops,
    }.get(kernel)
    peak = fast or plain
    if engine.half_sums and device.name.startswith("GeForce") and (device.compute_capability or (0, 0)) >= (8, 0):
        peak = 2 * plain
    return Ceilings(bandwidth, peak * 1e12, plain * 1e12, count)


def seconds(
    work: Traffic, has: Ceilings, how: Manner, logs: dict[str, float], load: Load, room: float | None = None
) -> tuple[float, float, float]:
    """(tokens, their seconds, sequences) of a load. room: bytes for caches, over all devices."""
    reach = rates(logs)
    prompt = _SHORT if load.prompt is None else load.prompt
    generated = _SHORT if load.generated is None else load.generated
    if load.phase == "prefill":
        n = load.sequences or 1
        if load.micro:
            context = generated + prompt / 2
            return n, roofline.micro_batch(work, has, how, reach, n, context), 1
        return n * prompt, roofline.prefill(work, has, how, reach, n, prompt), n
    context = prompt + generated / 2
    n = load.sequences or max(1.0, (room or 0.0) / max(1.0, work.cache_bytes(context)) * reach.concurrency)
    total = generated * roofline.decode(work, has, how, reach, n, context)
    if load.whole and prompt > 1:
        total += n * roofline.prefill(work, has, how, reach, 1, prompt)
    return n * generated, total, n


def predict(
    work: Traffic,
    setting: Setting,
    load: Load,
    *,
    room: float | None = None,
    threads: int | None = None,
    fit: Fitted | None = None,
) -> Prediction | None:
    """Tokens per second of a load; None where nothing supports a figure: a device without a bandwidth, or without a
    rate for 16 bits where one is needed."""
    fit = fit or fitted()
    how = manner(setting)
    has = ceilings(setting.device, setting.count, setting.kernel, setting.engine, threads)
    if has is None:
        return None
    logs = fit.logs(setting)
    log, deviation, n = _log_and_deviation(lambda q: seconds(work, has, how, q, load, room), setting, logs, fit, load)
    middle = math.exp(log)
    return Prediction(
        middle, middle * math.exp(-Z * deviation), middle * math.exp(Z * deviation),
        _bound(work, has, how, logs, load, n), basis(setting, fit), n,
    )  # fmt: skip


def manner(setting: Setting) -> Manner:
    how = setting.engine.manner
    # On a CPU the host that prepares a kernel is what runs it.
    return replace(how, expands=setting.kernel == "nf4", overlaps=how.overlaps and setting.device.kind != "cpu")


def _log_and_deviation(
    run: Callable[[dict[str, float]], tuple[float, float, float]],
    setting: Setting,
    logs: dict[str, float],
    fit: Fitted,
    load: Load,
) -> tuple[float, float, float]:
    tokens, time, n = run(logs)
    log = math.log(tokens / time)
    variance = fit.noise[load.kind] ** 2
    if ("bandwidth", "engine", setting.engine.name) not in fit.terms:  # how it goes about a step is a guess
        variance += fit.noise["unseen engine"] ** 2
    for quantity, terms in setting.terms().items():
        moved, took, _ = run({**logs, quantity: logs[quantity] + _STEP})
        slope = (math.log(moved / took) - log) / _STEP
        if slope:
            variance += (slope * fit.deviation(quantity, terms)) ** 2
    return log, math.sqrt(variance), n


def _bound(work: Traffic, has: Ceilings, how: Manner, logs: dict[str, float], load: Load, n: float) -> str:
    tokens = n * (load.prompt or _SHORT) if load.phase == "prefill" and not load.micro else n
    reach = rates(logs)
    reading = (work.weight_bytes(tokens) + work.head_bytes) / (has.bandwidth * reach.bandwidth)
    return "compute" if 2 * tokens * work.values / (has.peak * reach.compute) > reading else "memory"


def basis(setting: Setting, fit: Fitted) -> str:
    """ "figures of vllm on other devices", in words."""
    known = fit.terms
    device = any(("bandwidth", "device", setting.device_key) == term for term in known)
    engine = ("bandwidth", "engine", setting.engine.name) in known
    pair = any(
        t[:2] == ("compute", "engine, device") and t[2] == f"{setting.engine.name}, {setting.device_key}" for t in known
    )
    if pair:
        return f"published figures of {setting.engine.name} on {setting.device.name}"
    if engine:
        return f"published figures of {setting.engine.name} on other devices" + (
            "; of this device with other engines" if device else ""
        )
    kind = {"eager": "engines that run in eager mode", "graph": "engines with CUDA graphs", "native": "native engines"}
    words = kind.get(setting.engine.family, "any engine")
    return f"no figure of {setting.engine.name}: those of {words}" + ("; this device among them" if device else "")
