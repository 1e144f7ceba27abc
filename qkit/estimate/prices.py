"""Dated prices: what a target rents for (the catalogue), and what providers ask for tokens (profiles/hosted.csv)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

from ..errors import QkitError
from ..hardware.catalogue import profile_path
from ..hardware.device import Device, Price
from ..models.architecture import Architecture

_SAME = 0.004  # a share of its parameters by which a model may differ from the one of a price


@dataclass(frozen=True)
class Hosted:
    """Dollars a million tokens of a model at a provider, on a date."""

    model: str
    model_type: str
    parameters_b: float
    provider: str
    usd_in: float
    usd_out: float
    date: str
    source: str

    @property
    def words(self) -> str:
        return f"{self.model} at {self.provider}, {self.date} ({self.source})"


@cache
def hosted_prices() -> tuple[Hosted, ...]:
    path = profile_path("hosted.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return tuple(
            Hosted(**{k: float(v) if k in ("parameters_b", "usd_in", "usd_out") else v for k, v in row.items()})  # type: ignore[arg-type]
            for row in rows
        )
    except (TypeError, ValueError) as error:
        raise QkitError(f"{path.name} holds a row that is no price: {error}", "reinstall qkit") from None


def hosted(arch: Architecture) -> Hosted | None:
    """The middle of what providers ask for a model of this type and size, by the price of new tokens; None: no price is
    known here."""
    found = [
        each
        for each in hosted_prices()
        if each.model_type == arch.model_type and abs(arch.parameters / 1e9 / each.parameters_b - 1) < _SAME
    ]
    ordered = sorted(found, key=lambda each: (each.usd_out, each.usd_in))
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def rent(device: Device) -> Price | None:
    """The middle of a device's prices an hour; None: none is known here."""
    found = sorted((p for p in device.prices if p.usd_per_hour is not None), key=lambda p: p.usd_per_hour or 0)
    return found[(len(found) - 1) // 2] if found else None


def purchase_price(device: Device) -> Price | None:
    """What a device was bought for at last; None: no price is known here."""
    found = sorted((p for p in device.prices if p.usd is not None), key=lambda p: p.date)
    return found[-1] if found else None
