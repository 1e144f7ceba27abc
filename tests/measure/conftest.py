from __future__ import annotations

from collections.abc import Iterator

import pytest
from measure.sse_server import Server


@pytest.fixture
def serve() -> Iterator:
    started: list[Server] = []

    def make(script, **named) -> Server:
        started.append(Server(script, **named))
        return started[-1]

    yield make
    for server in started:
        server.stop()
