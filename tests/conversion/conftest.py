"""Conversions into several files, and what happens in the middle of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from faulty import OPTIONS
from pools import Use
from results import contents

from qkit.conversion import executor, pool, ray_pool, spread


@pytest.fixture
def several_files(monkeypatch):
    """Shards of a size that a tiny model has three of."""
    monkeypatch.setattr("qkit.conversion.plan.SHARD_BYTES", 150_000)


@pytest.fixture(scope="session")
def expected(llama, tmp_path_factory):
    """What an undisturbed conversion writes: three files of weights among it."""
    from qkit.conversion.run import convert

    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkit.conversion.plan.SHARD_BYTES", 150_000)
        convert(str(llama), out, **OPTIONS)
    found = contents(out)
    assert sum(name.startswith("model-") for name in found) == 3
    return found


@pytest.fixture
def midway(monkeypatch):
    """midway(action): as soon as the next conversion has noted its first file, `action()` happens, once."""
    from qkit.conversion import execute

    commit = execute.commit

    def arrange(action):
        def step(*args):
            commit(*args)
            monkeypatch.setattr(execute, "commit", commit)
            action()

        monkeypatch.setattr(execute, "commit", step)

    return arrange


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """use(pool): what `convert(ray="auto")` connects to."""

    def with_pool(pool: Any) -> Any:
        monkeypatch.setattr(ray_pool, "connected", lambda address: contextlib.nullcontext(pool))
        monkeypatch.setattr(executor, "find_spec", lambda name: name)
        return pool

    yield with_pool
    pool._made.cache_clear()
    spread._steps.cache_clear()
