"""What engines reach of a device's ceilings, from published figures: profiles/speed.json, by benchmarks/speed_fit.py.

The logarithm of every rate is a sum: a base, and a term for each thing that may matter (the engine, its release, the
kernel, the generation of the device, ...). Terms are normal with a spread a level, as in any model with random effects
(Gelman & Hill, "Data Analysis Using Regression and Multilevel/Hierarchical Models", ch. 12); a term that no figure
speaks of is 0 give or take its spread, so that the interval is wider for an engine or a device that was never seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ..hardware.catalogue import profile_path
from ..hardware.device import Device
from .engines import Engine
from .roofline import Rates

FILE = "speed.json"
QUANTITIES = ("launch", "bandwidth", "compute", "attention", "cache", "sequence", "link", "pipeline", "concurrency")
Term = tuple[str, str, str]  # quantity, level, key


@dataclass(frozen=True)
class Setting:
    """What rates hang on. release: the engine as it was named; library: the kernels' name where an engine has several;
    phase: "decode" or "prefill"; experts: whether the model has some, which kernels pass less well."""

    engine: Engine
    release: str
    kernel: str
    library: str
    device: Device
    count: int
    phase: str
    experts: bool = False

    @property
    def generation(self) -> str:
        """Devices whose kernels are alike: "NVIDIA 8.6", "Apple", "AMD CDNA3", "CPU x86"."""
        if self.device.kind == "cpu":
            return "CPU " + self.device.capability[:3]  # x86, arm
        if self.device.vendor == "Apple":
            return "Apple"
        known = self.device.capability if self.device.vendor == "NVIDIA" else self.device.arch
        return f"{self.device.vendor} {known}"

    @property
    def device_key(self) -> str:
        """Of a CPU that no catalogue knows its model: every machine calls it "cpu"."""
        return self.device.name if self.device.id == "cpu" else self.device.id

    def terms(self) -> dict[str, tuple[Term, ...]]:
        """Quantity -> its terms."""
        engine, kernel, generation, device = self.engine.name, self.kernel, self.generation, self.device_key
        own = f"{kernel} {self.library}".strip()
        levels = {
            "launch": {
                "family": self.engine.family,
                "engine": engine,
                "engine, kernel": f"{engine}, {own}",
                "engine, generation": f"{engine}, {generation}",
                "release": self.release,
                **({"engine, several": engine} if self.count > 1 and self.engine.manner.serial else {}),
            },
            "bandwidth": {
                "all": "",
                "kernel": kernel,
                "engine": engine,
                "engine, kernel": f"{engine}, {own}",
                "vendor": self.device.vendor,
                "generation": generation,
                "device": device,
                "kernel, generation": f"{kernel}, {generation}",
                "release": self.release,
                **({"experts": engine} if self.experts else {}),
            },
            "compute": {
                "all": "",
                "kernel": kernel,
                "library": own,
                "engine": engine,
                "engine, kernel": f"{engine}, {own}",
                "engine, kernel, phase": f"{engine}, {own}, {self.phase}",
                "vendor": self.device.vendor,
                "generation": generation,
                "device": device,
                "engine, device": f"{engine}, {device}",
                "library, device": f"{self.library}, {device}" if self.library else "",
                "release": self.release,
                **({"experts": f"{engine}, {self.phase}"} if self.experts else {}),
            },
            "attention": {"all": "", "engine": engine, "generation": generation},
            "cache": {"family": self.engine.family, "engine": engine, "release": self.release},
            "sequence": {"family": self.engine.family, "engine": engine, "release": self.release},
            "link": {"all": ""},
            "pipeline": {"all": ""},
            "concurrency": {"all": "", "release": self.release},
        }
        return {q: tuple((q, level, key) for level, key in found.items()) for q, found in levels.items()}


@dataclass(frozen=True)
class Fitted:
    """The fit.

    base      log rates; launch's by family
    spread    quantity -> level -> standard deviation of its terms
    noise     of log tokens/s, by kind of figure, and of an engine of which there is none
    terms     (value, standard deviation) of each that figures speak of
    together  what is left of those deviations in a sum of terms, whose errors cancel in part since the same figures
              told them
    """

    base: Mapping[str, float]
    spread: Mapping[str, Mapping[str, float]]
    noise: Mapping[str, float]
    terms: Mapping[Term, tuple[float, float]]
    together: float = 1.0
    source: str = ""

    def base_of(self, quantity: str, family: str) -> float:
        return self.base[f"{quantity} {family}".strip()] if quantity == "launch" else self.base[quantity]

    def logs(self, setting: Setting) -> dict[str, float]:
        """Quantity -> log rate."""
        return {
            quantity: self.base_of(quantity, setting.engine.family)
            + sum(self.terms[term][0] for term in terms if term in self.terms)
            for quantity, terms in setting.terms().items()
        }

    def deviation(self, quantity: str, terms: tuple[Term, ...]) -> float:
        """Standard deviation of a log rate, its terms taken as independent."""
        found = (
            self.together * self.terms[t][1] if t in self.terms else self.spread[quantity].get(t[1], 0.0) for t in terms
        )
        return math.sqrt(sum(each * each for each in found))


def rates(logs: Mapping[str, float]) -> Rates:
    return Rates(**{name: math.exp(value) for name, value in logs.items()})


@cache
def fitted() -> Fitted:
    """The fit that comes with qkit."""
    return from_dict(json.loads(profile_path(FILE).read_text(encoding="utf-8")))


def from_dict(document: Mapping[str, object]) -> Fitted:
    terms: dict[Term, tuple[float, float]] = {}
    for quantity, levels in document["terms"].items():  # type: ignore[attr-defined]
        for level, keys in levels.items():
            for key, (value, deviation) in keys.items():
                terms[quantity, level, key] = (value, deviation)
    given = {name: document[name] for name in ("base", "spread", "noise", "together", "source")}
    return Fitted(**given, terms=terms)  # type: ignore[arg-type]


def as_dict(fit: Fitted) -> dict[str, object]:
    terms: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (quantity, level, key), (value, deviation) in sorted(fit.terms.items()):
        terms.setdefault(quantity, {}).setdefault(level, {})[key] = [round(value, 4), round(deviation, 4)]
    return {
        "source": fit.source,
        "base": {k: round(v, 4) for k, v in fit.base.items()},
        "spread": fit.spread,
        "noise": fit.noise,
        "together": fit.together,
        "terms": terms,
    }
