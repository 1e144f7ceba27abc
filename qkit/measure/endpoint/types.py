"""What a load test of a running server holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 3  # that of report/schema.json


@dataclass(frozen=True)
class Spread:
    """Seconds: the mean and percentiles of one figure over requests (of gaps: over chunks)."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Failures:
    """Requests that failed for one reason, and what the first of them said."""

    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Level:
    """One concurrency. Every figure but `requests`, `failed` and `seconds` is of the requests that succeeded.

    concurrency     requests under way at any time, each begun as soon as another ends
    requests        sent in all
    succeeded       of them; `failed` has the others
    ended_early     of those that succeeded, the ones that the model ended before max_tokens
    seconds         from the first request sent to the last one ended
    connect         to open a connection, which every request does; not part of the figures below
    ttft            from the request sent to its first token
    tpot            of a request: (last token - first token) / (tokens - 1)
    gap             between one chunk and the next, over all chunks
    latency         from the request sent to its end
    prompt_tokens, output_tokens   sums
    requests_per_s  succeeded / seconds
    output_tps      output tokens / seconds
    steady_tps      the same until the first connection finds no more request to send, so that the level's end, where
                    fewer are under way, does not count; None where no request came so far
    problem         why the level sent fewer requests than it should have
    """

    concurrency: int
    requests: int
    succeeded: int
    failed: tuple[Failures, ...]
    ended_early: int
    seconds: float
    connect: Spread | None
    ttft: Spread | None
    tpot: Spread | None
    gap: Spread | None
    latency: Spread | None
    prompt_tokens: int | None
    output_tokens: int
    requests_per_s: float
    output_tps: float
    steady_tps: float | None
    problem: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """A running server under load. `as_dict` is the JSON document.

    route          "/completions" or "/chat/completions"
    context        prompt tokens asked for; prompt_basis says how a prompt of that many was made
    max_tokens     new tokens asked for
    ignore_eos     whether the server took `ignore_eos` and `min_tokens`, so that each request gives that many
    counted        how output tokens were counted: "usage" (the server's), "chunks" (of the stream), or both
    warmups, warmup_failures   requests before the first level, in no figure
    unmeasured     concurrencies that were not tried
    problem        why
    """

    url: str
    model: str
    route: str
    context: int
    prompt_basis: str
    max_tokens: int
    ignore_eos: bool
    counted: str
    warmups: int
    warmup_failures: tuple[Failures, ...]
    levels: tuple[Level, ...]
    unmeasured: tuple[int, ...]
    problem: str | None
    provenance: dict[str, Any]
    formulas: dict[str, str]
    thresholds: dict[str, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    out: str | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "endpoint", "passed": self.passed, **asdict(self)}
