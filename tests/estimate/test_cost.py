"""Costs against sums written out, break-even volumes against a search over every volume."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkit.errors import QkitError
from qkit.estimate.cost import HOURS, against, bill, costs, purchase


def test_an_hour_of_tokens_costs_an_hour():
    own = costs(2.0, prefill_tps=8000, decode_tps=500, utilization=0.5, inputs=3)
    # In an hour half of which computes: 900 s of prompts and 900 s of new tokens.
    assert 900 * 8000 / 1e6 * own.per_million_in + 900 * 500 / 1e6 * own.per_million_out == pytest.approx(2.0)
    seconds = 3 / 8000 + 1 / 500  # of four tokens
    assert own.per_million == pytest.approx(2.0 / 3600 / 0.5 * seconds / 4 * 1e6)
    assert own.capacity == pytest.approx(HOURS * 3600 * 0.5 / seconds * 4 / 1e6)
    assert own.monthly == pytest.approx(2.0 * HOURS)
    assert own.capacity * own.per_million == pytest.approx(own.monthly)


def test_no_prompts():
    own = costs(1.0, 1000, 100, utilization=1, inputs=0)
    assert own.per_million == pytest.approx(own.per_million_out)


@given(
    price=st.floats(0.1, 20), decode=st.floats(10, 20000), ratio=st.floats(1, 40), used=st.floats(0.05, 1),
    inputs=st.floats(0, 20), hosted_in=st.floats(0.01, 10), hosted_out=st.floats(0.01, 30),
)  # fmt: skip
def test_break_even_is_where_a_search_finds_it(price, decode, ratio, used, inputs, hosted_in, hosted_out):
    own = costs(price, decode * ratio, decode, utilization=used, inputs=inputs)
    found = against(own, hosted_in, hosted_out)

    def cheaper(millions: float) -> bool:
        return bill(own, millions)[1] <= millions * found.hosted * (1 + 1e-9)

    steps = [own.capacity * n * f for n in range(1, 60) for f in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.0001)]
    if found.first is None:
        assert not any(cheaper(v) for v in steps)
        return
    assert cheaper(found.first) and not cheaper(found.first * 0.999)
    assert found.first_bill == pytest.approx(own.monthly)
    assert not any(cheaper(v) for v in steps if v < found.first * 0.999)
    if found.always is not None and found.always_targets < 50:
        assert all(cheaper(v) for v in steps if v >= found.always * (1 + 1e-6))
        before = (found.always_targets - 1) * own.capacity  # what one target fewer can do
        if before < found.always * (1 - 1e-6):
            assert not cheaper((before + found.always) / 2)
        assert bill(own, found.always)[0] == found.always_targets


def test_hosted_for_nothing_is_never_beaten():
    assert against(costs(1.0, 1000, 100), 0, 0).first is None


def test_purchase():
    own = costs(2.0, 1000, 100, utilization=0.5)
    bought = purchase(1500, 450, own, kilowatt_hour=0.2, overhead=1.0)
    assert bought.power_per_hour == pytest.approx(0.45 * (0.5 + 0.5 / 3) * 0.2)
    assert bought.months == pytest.approx(1500 / (2.0 - bought.power_per_hour) / HOURS)
    assert purchase(1500, 450, costs(0.01, 1000, 100)).months is None


@pytest.mark.parametrize(
    ("given_", "word"),
    [
        ({"usd_per_hour": -1}, "price per hour"),
        ({"usd_per_hour": math.nan}, "price per hour"),
        ({"usd_per_hour": 1, "utilization": 0}, "utilization"),
        ({"usd_per_hour": 1, "utilization": 1.5}, "utilization"),
        ({"usd_per_hour": 1, "inputs": -1}, "prompt tokens"),
    ],
)
def test_no_price_at_all(given_, word):
    price = given_.pop("usd_per_hour")
    with pytest.raises(QkitError, match=word):
        costs(price, 1000, 100, **given_)


def test_hosted_prices_are_checked():
    with pytest.raises(QkitError, match="hosted price"):
        against(costs(1.0, 1000, 100), -1, 1)
