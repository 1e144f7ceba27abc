"""The next step down where a model does not fit: other formats and smaller caches, and the best scheme that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import units
from ..errors import QkitError
from ..hardware.catalogue import fast_formats
from ..hardware.device import Device, Target
from ..models.architecture import Architecture
from .fit import Fit, fit
from .parts import Weights
from .serving import usable
from .weights import of_architecture

# Schemes of each format, from the one that costs least quality on. A device without FP8 gets w8a16 for "fp8".
LADDERS: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("fp8", "w4a16"),
    "gptq": ("w8a16", "w4a16", "w3a16", "w2a16"),
    "gptq_v2": ("w8a16", "w4a16", "w3a16", "w2a16"),
    "awq": ("w4a16-asym",),
    "bnb": ("int8", "nf4", "nf4-dq"),
    "gguf": (
        "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
    ),
    "mxfp4": ("mxfp4a16",),
}  # fmt: skip
# Those that a step down is looked for among, where the device has fast kernels for them.
_STEPS: tuple[tuple[str, str], ...] = (
    ("compressed-tensors", "fp8"), ("compressed-tensors", "nvfp4a16"), ("compressed-tensors", "w4a16"), ("bnb", "nf4"),
    ("gguf", "q8_0"), ("gguf", "q6_k"), ("gguf", "q5_k_m"), ("gguf", "q4_k_m"), ("gguf", "iq4_xs"), ("gguf", "q3_k_m"),
    ("gguf", "q2_k"),
)  # fmt: skip
_ANY = ("w4a16", "w8a16", "fp8a16", "bnb", "gguf")  # of a card that says neither maker nor capability
_DEVICES = (2, 4, 8, 16)


@dataclass(frozen=True)
class Step:
    """A way to hold the model on a target. nbytes: of all weights; kv_dtype: None: 16 bits."""

    format: str
    scheme: str
    kv_dtype: str | None
    nbytes: int
    fit: Fit

    @property
    def name(self) -> str:
        """ "gguf q4_k_m", "compressed-tensors w4a16 with an F8_E4M3 cache"."""
        cache = f" with an {self.kv_dtype} cache" if self.kv_dtype else ""
        return f"{self.format} {self.scheme}".replace("safetensors none", "16 bits") + cache

    @property
    def largest_context(self) -> int | None:
        """Of one sequence."""
        return self.fit.largest_context(1)

    @property
    def largest_batch(self) -> int | None:
        """At the context that was asked for."""
        return self.fit.largest_batch(self.fit.context)


class Formats:
    """An architecture's weights in every format that is asked for, each computed once."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self._known: dict[tuple[str, str], Weights | QkitError] = {}

    def weights(self, format: str, scheme: str) -> Weights:
        """Raises QkitError where the format does not hold this model so."""
        key = format, scheme
        if key not in self._known:
            try:
                named = None if scheme == "none" else scheme
                self._known[key] = of_architecture(self.arch, named, format)
            except QkitError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, QkitError):
            raise found
        return found

    def total(self, format: str, scheme: str) -> int | None:
        """Bytes of all weights; None where the format does not hold this model so."""
        try:
            return self.weights(format, scheme).total
        except QkitError:
            return None


def engine_of(format: str, device: Device) -> str:
    """The engine in which a device runs a format."""
    if format == "gguf":
        return "llama.cpp"
    if format == "bnb" or device.vendor == "Apple":
        return "transformers"
    return "qkit" if device.kind == "cpu" else "vllm"


def _fast(device: Device) -> frozenset[str]:
    return frozenset(fast_formats(device) or (() if device.vendor else _ANY))


def _kernel(format: str, scheme: str) -> str:
    return format if format in ("gguf", "bnb") else scheme


def _for_device(format: str, scheme: str, fast: frozenset[str]) -> str:
    """Eight bits as the device multiplies them."""
    return "w8a16" if (format, scheme) == ("compressed-tensors", "fp8") and "fp8" not in fast else scheme


def small_cache(engine: str, device: Device) -> str | None:
    """The type that halves an engine's KV cache on a device; None where there is none."""
    if engine == "llama.cpp":
        return "Q8_0"
    return "F8_E4M3" if engine == "vllm" and ("fp8" in _fast(device) or "fp8a16" in _fast(device)) else None


def steps_down(
    arch: Architecture,
    target: Target,
    context: int,
    batch: int = 1,
    now: tuple[str, str] = ("safetensors", "none"),
    formats: Formats | None = None,
) -> tuple[Step, ...]:
    """What the formats that are sensible on a device would buy, and a cache of half the bytes, by their bits.

    now      (format, scheme) that the model has: what is not smaller is left out
    formats  weights known from other targets
    """
    known = formats or Formats(arch)
    device, fast = target.device, _fast(target.device)
    before = known.weights(*now).total

    def step(format: str, scheme: str, kv_dtype: str | None) -> Step:
        weights = known.weights(format, scheme)
        answer = fit(arch, weights, target, engine_of(format, device), context, batch, kv_dtype)
        return Step(format, scheme, kv_dtype, weights.total, answer)

    smaller = []
    for format, scheme in _STEPS:
        scheme = _for_device(format, scheme, fast)
        if _kernel(format, scheme) in fast and (known.total(format, scheme) or before) < before:
            smaller.append(step(format, scheme, None))
    # A cache of half the bytes: with what there is now, and with the smallest format of each engine.
    last = {s.fit.engine: (s.format, s.scheme) for s in smaller}
    kinds = {kind: small_cache(engine_of(kind[0], device), device) for kind in (now, *last.values())}
    halved = {kind: step(*kind, kv_dtype) for kind, kv_dtype in kinds.items() if kv_dtype}
    first = [halved.pop(now)] if now in halved else []
    return tuple(s for s in (*first, *smaller, *halved.values()) if not s.fit.problem)


@dataclass(frozen=True)
class Choice:
    """A scheme and why. larger: those before it, which did not fit, with what each needs on a device."""

    format: str
    scheme: str
    fit: Fit
    larger: tuple[tuple[str, int], ...]

    @property
    def words(self) -> str:
        """What was chosen, for which load, and what it is expected to take."""
        f = self.fit
        asked = f"{f.batch} x {f.context:,} tokens"
        text = f"{self.scheme}: the best scheme of {self.format} that fits {f.target.spec} in {f.engine}, {asked}; "
        rest = f.memory.total - f.memory.of("weights") - f.memory.of("KV cache")
        text += f"expected {units.size(f.memory.total)} of {units.size(f.usable or 0)}: weights "
        text += f"{units.size(f.memory.of('weights'))}, KV cache {units.size(f.memory.of('KV cache'))}, the rest "
        text += units.size(rest)
        if self.larger:
            text += "; too large: " + ", ".join(f"{name} ({units.size(nbytes)})" for name, nbytes in self.larger)
        return text


def best_scheme(
    arch: Architecture, target: Target, context: int, batch: int, format: str, most_bits: float | None = None
) -> Choice:
    """The best uniform scheme of a format with which `batch` sequences of `context` tokens fit.

    most_bits  leave out schemes of more bits
    Raises QkitError, saying what would be needed, where none fits."""
    from ..spec import preset

    if format not in LADDERS:
        raise QkitError(f"format {format} has no schemes to choose from", "formats: " + ", ".join(LADDERS))
    known, device = Formats(arch), target.device
    engine, fast = engine_of(format, device), _fast(target.device)
    if usable(target, engine)[0] is None:
        hint = f"say it with the name, such as '{device.name} 256GB', or describe the device in a JSON file"
        raise QkitError(f"the memory of {device.name} is not known", hint)
    larger: list[tuple[str, int]] = []
    last: Fit | None = None
    refused: QkitError | None = None
    for scheme in LADDERS[format]:
        scheme = _for_device(format, scheme, fast)
        spec = preset(scheme)
        if most_bits is not None and spec is not None and spec.bits > most_bits:
            continue
        try:
            weights = known.weights(format, scheme)
        except QkitError as error:
            refused = error
            continue
        last = fit(arch, weights, target, engine, context, batch)
        if last.problem:
            raise QkitError(f"{target.spec}: {last.problem}", "choose another --format or device")
        if last.fits:
            return Choice(format, scheme, last, tuple(larger))
        larger.append((scheme, last.memory.total))
    if last is None:
        raise refused or QkitError(
            f"format {format} has no scheme of {most_bits:g} bits or fewer, which is what the source has",
            "choose another --format, or leave --fit out",
        )
    raise _nothing(known, last, larger[-1], format)


def _nothing(known: Formats, last: Fit, smallest: tuple[str, int], format: str) -> QkitError:
    """What would be needed: less context, fewer sequences, more devices, another format."""
    target, asked = last.target, f"{last.batch} x {last.context:,} tokens"
    scheme, needed = smallest
    ways = []
    context, batch = last.largest_context(last.batch), last.largest_batch(last.context)
    if context:
        ways.append(f"--context {context}")
    if batch:
        ways.append(f"--batch {batch}")
    for count in (n for n in _DEVICES if n > target.count):
        more = fit(
            known.arch,
            known.weights(format, scheme),
            Target(target.device, count),
            last.engine,
            last.context,
            last.batch,
        )
        if more.fits:
            ways.append(f"--fit {more.target.spec}")
            break
    ways += _other(known, last, format)
    return QkitError(
        f"no scheme of {format} fits {target.spec}: {scheme}, the smallest, needs {units.size(needed)} for {asked}, "
        f"and {units.size(last.usable or 0)} are usable",
        "it fits with " + ", or ".join(ways) if ways else "a smaller model, or a larger device, would fit",
    )


def _other(known: Formats, last: Fit, format: str) -> Sequence[str]:
    """Of the best schemes of other formats that fit, the one with the most bytes, if any."""
    found: tuple[int, str] = (0, "")
    for other, ladder in LADDERS.items():
        engine = engine_of(other, last.target.device)
        for scheme in ladder if other != format else ():
            total = known.total(other, scheme)
            if (
                total
                and fit(known.arch, known.weights(other, scheme), last.target, engine, last.context, last.batch).fits
            ):
                found = max(found, (total, f"--format {other} ({scheme})"))
                break
    return [found[1]] if found[0] else []
