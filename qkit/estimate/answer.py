"""What is said of one model on one target: whether it fits, with what context and batch, how fast, at what cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..hardware.device import Target
from ..hardware.fast import fast_formats, kinds_of
from ..spec.dtypes import ITEMSIZE
from . import engines
from .cost import Against, Costs, Purchase, against, costs, purchase
from .fit import Fit
from .intensity import Roof, roof
from .prices import purchase_price, rent
from .rates import Setting
from .speed import Load, Prediction, ceilings, manner, predict
from .subject import Subject
from .traffic import Traffic, traffic

PROMPTS = (128, 512, 2048, 8192, 32768)  # tokens whose time to the first new one is said
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_SEQUENCES = 256  # that servers run at once by default, or thereabouts
_ENOUGH = 0.1  # seconds to the first token that nobody notices


@dataclass(frozen=True)
class Money:
    """usd_per_hour, utilization, inputs: as `cost.costs`. hosted: dollars a million tokens in and out."""

    usd_per_hour: float | None = None
    utilization: float = 0.5
    inputs: float = 3.0
    hosted: tuple[float, float] | None = None
    hosted_source: str = ""


@dataclass(frozen=True)
class First:
    """Seconds from a prompt of so many tokens to the first new one, with the interval."""

    prompt: int
    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Speeds:
    """decode: new tokens a second over all sequences, at the context and batch asked for; prefill: of one prompt of
    that context. loaded: decode with as many sequences as fit (at most 256). batches, contexts: decode along each.
    instant: the longest prompt whose first token comes within 0.1 s; None: not even 16 tokens. roof: where these loads
    stand under the device's ceilings; None where no curves were asked for."""

    decode: Prediction
    prefill: Prediction
    loaded: Prediction
    first: tuple[First, ...]
    batches: tuple[tuple[int, Prediction], ...]
    contexts: tuple[tuple[int, Prediction], ...]
    instant: int | None
    roof: Roof | None


@dataclass(frozen=True)
class Answer:
    """fit: memory; speeds: None where nothing supports a figure, unknown says why; costs at full load. slow: that the
    device has no fast kernels for the model's format, "" where it has or no list says so."""

    target: Target
    engine: str
    fit: Fit
    speeds: Speeds | None
    unknown: str
    costs: Costs | None
    against: Against | None
    purchase: Purchase | None
    purchase_source: str
    slow: str = ""


def answer(subject: Subject, fit: Fit, money: Money, work: Traffic, detailed: bool = False) -> Answer:
    """detailed: with curves over batch and context."""
    target = fit.target
    unknown, speeds = "", None
    if fit.problem:
        unknown = fit.problem
    elif not fit.fits:
        unknown = "it does not fit" if fit.fits is False else "the memory of the device is not known"
    if not unknown or (fit.fits is None and not fit.problem):
        speeds = _speeds(subject, fit, work, detailed)
        unknown = "" if speeds else "the catalogue has no bandwidth, or no rate, for this device"
    spent = _costs(fit, speeds, money)
    bought, source = None, ""
    if spent and (price := purchase_price(target.device)) and target.device.tdp_w:
        bought = purchase((price.usd or 0) * target.count, target.device.tdp_w * target.count, spent)
        source = f"{price.market}, {price.date} ({price.source})"
    versus = against(spent, *money.hosted) if spent and money.hosted else None
    slow = "" if fit.problem else _slow(subject, target)
    return Answer(target, fit.engine, fit, speeds, unknown, spent, versus, bought, source, slow)


def _slow(subject: Subject, target: Target) -> str:
    device, spec = target.device, subject.spec
    if spec is None or not device.vendor:
        return ""
    kinds = kinds_of(spec)
    if not kinds or not fast_formats(device).keys().isdisjoint(kinds):
        return ""
    lacking = f"no fast kernels for {spec.describe()} on {device.name}"
    return f"{lacking}: what it saves is memory, and it may run slower than this"


def work_of(subject: Subject, engine: str, kv_dtype: str | None) -> Traffic:
    size = float(ITEMSIZE.get(kv_dtype or "BF16", 1.0625))  # ggml's 8-bit blocks: 34 bytes for 32 values
    return traffic(subject.arch, subject.weights, cache_bytes=size, latent=engine != "transformers")


def _setting(subject: Subject, fit: Fit, work: Traffic, phase: str) -> Setting:
    engine = engines.ENGINES[fit.engine]
    kernel = engines.kernel_of(subject.spec)
    library = engines.library(engine, kernel)
    return Setting(
        engine, engines.release(engine), kernel, library, fit.target.device, fit.target.count, phase, work.experts > 0
    )


def _speeds(subject: Subject, fit: Fit, work: Traffic, detailed: bool) -> Speeds | None:
    decoding, filling = (_setting(subject, fit, work, phase) for phase in ("decode", "prefill"))

    def decode(batch: int, context: int) -> Prediction | None:
        return predict(work, decoding, Load("decode", batch, context, 1))

    def prefill(prompt: int) -> Prediction | None:
        return predict(work, filling, Load("prefill", 1, prompt, 0))

    def first(prompt: int) -> First | None:
        found = prefill(prompt)
        return First(prompt, prompt / found.tokens_per_s, prompt / found.high, prompt / found.low) if found else None

    at, filled = decode(fit.batch, fit.context), prefill(fit.context)
    if at is None or filled is None:
        return None
    most = min(fit.largest_batch(fit.context) or fit.batch, _MOST_SEQUENCES)
    loaded = decode(max(most, fit.batch), fit.context) or at
    batches: list[tuple[int, Prediction]] = []
    contexts: list[tuple[int, Prediction]] = []
    prompts = [fit.context]
    if detailed:
        counts = sorted({*(n for n in BATCHES if n < most), most})
        batches = [(n, p) for n in counts if (p := decode(n, fit.context))]
        lengths = sorted({*PROMPTS, fit.context})
        kept = [n for n in lengths if n <= fit.most and (fit.usable is None or fit.fits_at(n, fit.batch))]
        contexts = [(n, p) for n in kept if (p := decode(fit.batch, n))]
        prompts = [n for n in lengths if n <= fit.most]
    firsts = tuple(f for n in prompts if (f := first(n)))
    if not detailed:
        return Speeds(at, filled, loaded, firsts, (), (), None, None)
    has = ceilings(decoding.device, decoding.count, decoding.kernel, decoding.engine)
    fills = tuple((n, p) for n in prompts if n in (PROMPTS[0], fit.context) and (p := prefill(n)))
    under = None if has is None else roof(work, has, manner(decoding), fit.context, tuple(batches), fills)
    return Speeds(at, filled, loaded, firsts, tuple(batches), tuple(contexts), _instant(first, fit.most), under)


def _instant(first: Callable[[int], First | None], most: int) -> int | None:
    """The longest prompt answered within 0.1 s, by halving."""
    from .fit import largest

    def within(n: int) -> bool:
        found = first(16 * n)
        return found is not None and found.seconds <= _ENOUGH

    found = largest(within, max(1, most // 16))
    return found and 16 * found


def _costs(fit: Fit, speeds: Speeds | None, money: Money) -> Costs | None:
    if speeds is None or not fit.fits:
        return None
    price = rent(fit.target.device)
    if money.usd_per_hour is not None:
        hour, source = money.usd_per_hour, "given"
    elif price is not None and price.usd_per_hour is not None:
        hour, source = price.usd_per_hour * fit.target.count, f"{price.market}, {price.date} ({price.source})"
    else:
        return None
    return costs(
        hour, speeds.prefill.tokens_per_s, speeds.loaded.tokens_per_s,
        utilization=money.utilization, inputs=money.inputs, source=source,
    )  # fmt: skip
