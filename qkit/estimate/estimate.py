"""`estimate`: a model on any devices, predicted from its headers or its config, before anything is rented or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import QkitError
from ..hardware.device import Target
from .answer import Answer, Money, answer, work_of
from .cache import value_bytes
from .fit import Fit, fit_all
from .loaded import as_loaded
from .prices import hosted
from .steps import Formats, Step, engine_of, steps_down
from .subject import Subject, subject

_CONTEXT = 8192
_DETAILED = 4  # targets up to which each gets curves and steps down


@dataclass(frozen=True)
class Asked:
    """What was asked. None: chosen by qkit."""

    context: int | None = None
    batch: int = 1
    format: str | None = None
    scheme: str | None = None
    engine: str | None = None
    kv_cache: str | None = None
    usd_per_hour: float | None = None
    hosted: tuple[float, ...] = ()
    utilization: float = 0.5
    inputs: float = 3.0


@dataclass(frozen=True)
class Estimate:
    """Everything here is predicted.

    steps    per detailed target: what other formats and a smaller cache would buy
    hosted_source  where the price of a hosted model comes from; "" without one
    """

    subject: Subject
    asked: Asked
    context: int
    kv_dtype: str | None
    answers: tuple[Answer, ...]
    steps: tuple[tuple[Step, ...], ...]
    money: Money

    @property
    def detailed(self) -> bool:
        return len(self.answers) <= _DETAILED


def estimate(model: str, targets: Sequence[Target], asked: Asked | None = None) -> Estimate:
    """`model` on each of `targets`, as it is or as it would be converted.

    Raises QkitError for what is no model, for a format or scheme that does not hold it, for numbers out of range."""
    asked = asked or Asked()
    found = subject(model, asked.format, asked.scheme)
    most = found.arch.max_tokens
    context = asked.context or min(_CONTEXT, most or _CONTEXT)
    kv_dtype = _kv_dtype(asked.kv_cache)
    money = _money(found, asked)
    detailed = len(targets) <= _DETAILED
    fits = _fits(found, targets, asked, context, kv_dtype)
    held = {key: as_loaded(found, *key) for key in {_held_by(f.engine, f.target) for f in fits}}
    works = {key: work_of(each, key[0], kv_dtype) for key, each in held.items()}
    keys = [_held_by(f.engine, f.target) for f in fits]
    answers = tuple(answer(held[k], f, money, works[k], detailed) for k, f in zip(keys, fits, strict=True))
    steps: tuple[tuple[Step, ...], ...] = ()
    if detailed and found.spec is None and asked.format is None:
        formats = Formats(found.arch)
        steps = tuple(steps_down(found.arch, t, context, asked.batch, formats=formats) for t in targets)
    return Estimate(found, asked, context, kv_dtype, answers, steps, money)


def _fits(found: Subject, targets: Sequence[Target], asked: Asked, context: int, kv_dtype: str | None) -> list[Fit]:
    """In the order of the targets; those that run the same engine are computed together."""
    engines = [asked.engine or engine_of(_format(found), t.device) for t in targets]
    fits: dict[int, Fit] = {}
    keys = [_held_by(engine, target) for engine, target in zip(engines, targets, strict=True)]
    for key in dict.fromkeys(keys):
        engine, at = key[0], [i for i, k in enumerate(keys) if k == key]
        weights = as_loaded(found, *key).weights
        made = fit_all(
            found.arch, weights, [targets[i] for i in at], engine, context, asked.batch, _for(engine, kv_dtype)
        )
        fits.update(zip(at, made, strict=True))
    return [fits[i] for i in range(len(targets))]


def _held_by(engine: str, target: Target) -> tuple[str, str]:
    """What decides how weights are held there."""
    return engine, "cpu" if target.device.kind == "cpu" else "gpu"


def _format(found: Subject) -> str:
    if found.container == "gguf":
        return "gguf"
    return "bnb" if found.spec is not None and found.spec.kind in ("nf4", "fp4", "llm.int8") else "safetensors"


def _for(engine: str, kv_dtype: str | None) -> str | None:
    """llama.cpp's name of a type, which has no FP8: its 8-bit blocks."""
    return "Q8_0" if engine == "llama.cpp" and kv_dtype == "F8_E4M3" else kv_dtype


def _kv_dtype(name: str | None) -> str | None:
    if name is None:
        return None
    known = {"fp8": "F8_E4M3", "f16": "F16", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
    dtype = known.get(name.lower(), name)
    try:
        value_bytes(dtype)
    except QkitError:
        raise QkitError(f"--kv-cache {name!r} is no type of a KV cache", "known: " + ", ".join(known)) from None
    return dtype


def _money(found: Subject, asked: Asked) -> Money:
    if len(asked.hosted) > 2:
        raise QkitError("--api-price takes one price, or one in and one out", "dollars per million tokens")
    if asked.hosted:
        price = (asked.hosted[0], asked.hosted[-1])
        return Money(asked.usd_per_hour, asked.utilization, asked.inputs, price, "given")
    known = hosted(found.arch)
    return Money(
        asked.usd_per_hour, asked.utilization, asked.inputs,
        (known.usd_in, known.usd_out) if known else None, known.words if known else "",
    )  # fmt: skip
