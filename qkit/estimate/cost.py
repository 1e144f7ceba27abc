"""Dollars per million tokens on a device that is rented or bought, and from which volume that beats a hosted model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import QkitError

HOURS = 730.5  # of a month: 365.25 days / 12 x 24
_M = 1e6


@dataclass(frozen=True)
class Costs:
    """What running one model on one target costs. Dollars; millions of tokens.

    usd_per_hour       of the target, all devices together; source: where and when the price was read
    utilization        share of the hours in which it computes
    per_million_in, per_million_out   of a prompt's tokens and of new ones; each bears the time that it takes
    per_million        of tokens in the mix of `inputs` prompt tokens to one new token
    capacity           millions of tokens a month in that mix at that utilization
    monthly            dollars a month, used or not
    """

    usd_per_hour: float
    source: str
    utilization: float
    inputs: float
    per_million_in: float
    per_million_out: float
    per_million: float
    capacity: float
    monthly: float


def costs(
    usd_per_hour: float,
    prefill_tps: float,
    decode_tps: float,
    *,
    utilization: float = 0.5,
    inputs: float = 3.0,
    source: str = "given",
) -> Costs:
    """Costs of a target that takes prompts in at `prefill_tps` and then gives new tokens out at `decode_tps`.

    Raises QkitError for a price that is no price and a utilization that is not above 0 and at most 1."""
    if not (math.isfinite(usd_per_hour) and usd_per_hour >= 0):
        raise QkitError(f"a price per hour must be a number from 0 up, not {usd_per_hour!r}")
    if not 0 < utilization <= 1:
        raise QkitError(f"utilization must be above 0 and at most 1, not {utilization:g}", "half of the hours is 0.5")
    if not (math.isfinite(inputs) and inputs >= 0):
        raise QkitError(f"prompt tokens to each new token must be a number from 0 up, not {inputs!r}")
    used = usd_per_hour / (3600 * utilization)
    seconds = (inputs / prefill_tps + 1 / decode_tps) / (inputs + 1)
    return Costs(
        usd_per_hour=usd_per_hour,
        source=source,
        utilization=utilization,
        inputs=inputs,
        per_million_in=_M * used / prefill_tps,
        per_million_out=_M * used / decode_tps,
        per_million=_M * used * seconds,
        capacity=HOURS * 3600 * utilization / seconds / _M,
        monthly=usd_per_hour * HOURS,
    )


@dataclass(frozen=True)
class Against:
    """A target against a hosted model at `hosted` dollars a million tokens in the same mix.

    first    millions of tokens a month from which the first target is cheaper, as long as it is enough; None: never
    first_bill  what they cost hosted: the bill above which self-hosting pays
    always   from here on it is cheaper however much more: whole targets are rented, so between these two there are
             volumes at which one target more makes it dearer again; None: never
    always_targets  the targets that `always` needs
    """

    hosted: float
    first: float | None
    first_bill: float | None
    always: float | None
    always_targets: int | None


def against(own: Costs, hosted_in: float, hosted_out: float) -> Against:
    """Raises QkitError for hosted prices below 0."""
    for price in (hosted_in, hosted_out):
        if not (math.isfinite(price) and price >= 0):
            raise QkitError(f"a hosted price must be a number from 0 up, not {price!r}", "dollars per million tokens")
    hosted = (own.inputs * hosted_in + hosted_out) / (own.inputs + 1)
    full = hosted * own.capacity  # what one target's tokens of a month cost hosted
    if full < own.monthly or full == 0:
        return Against(hosted, None, None, None, None)
    first = own.monthly / hosted
    # n targets full to the brim must be worth n + 1, so that the next one that is needed pays from its first token.
    spare = full - own.monthly
    full_targets = math.ceil(own.monthly / spare - 1e-9) if spare > 0 else None
    if full_targets is None:
        return Against(hosted, first, own.monthly, None, None)
    always = max(first, full_targets * own.monthly / hosted)
    return Against(hosted, first, own.monthly, always, max(1, full_targets))


def bill(own: Costs, millions: float) -> tuple[int, float]:
    """(whole targets, dollars a month) for so many millions of tokens a month."""
    targets = max(1, math.ceil(millions / own.capacity - 1e-9))
    return targets, targets * own.monthly


@dataclass(frozen=True)
class Purchase:
    """Buying against renting: months until the price is earned, at `kilowatt_hour` dollars and a device's full power in
    the hours that it computes (a third of it otherwise). None: renting is cheaper for ever."""

    usd: float
    power_per_hour: float
    months: float | None


def purchase(usd: float, watts: float, own: Costs, kilowatt_hour: float = 0.15, overhead: float = 1.3) -> Purchase:
    """overhead: of the building and the rest of the machine, on top of the device's own power."""
    load = own.utilization + (1 - own.utilization) / 3
    power = watts / 1000 * overhead * load * kilowatt_hour
    saved = own.usd_per_hour - power
    return Purchase(usd, power, usd / saved / HOURS if saved > 0 else None)
