"""What a profile holds. Every figure here was measured on this machine, but those of `Formula` and what stands under
`Measured.predicted`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..spec.dtypes import FLOATS
from .engines.types import Sweep
from .quality import Quality

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Memory:
    """Bytes that a process of the model's own takes on the device, measured. Weights are exact sums over tensors.

    packed, embeddings, unquantized  parts of `weights`: quantized linears (codes, scales, zeros); the input
                         embedding and an output head tied to it; everything else
    tokens, batch        what is in the cache: --context tokens in each of the largest --batch sequences
    kv_cache             sum over the cache's tensors
    activations          peak above weights and cache while those tokens run: activations and the kernels' scratch
    process              what the process holds beside weights, before them: Python, torch, libraries, driver
    total                weights + kv_cache + activations + process
    host                 of it, or beside it on a GPU: resident bytes in the machine's RAM after the run
    seen                 how the peak was seen
    problem              why kv_cache, activations, process, total, host and seen are None
    free_bytes           free on the device before the model was loaded, of device_bytes
    fits                 total <= free_bytes; None where there is no total
    """

    weights: int
    packed: int
    embeddings: int
    unquantized: int
    tokens: int
    batch: int
    kv_cache: int | None
    activations: int | None
    process: int | None
    total: int | None
    host: int | None
    seen: str | None
    problem: str | None
    free_bytes: int
    device_bytes: int
    fits: bool | None


@dataclass(frozen=True)
class Formula:
    """Bytes as computed from config.json and the headers, before anything is loaded.

    weights          every tensor at the type it is held in
    kv_cache         at `Memory.tokens` and `Memory.batch`; kv_formula says how
    max_tokens       the most the config says the model takes; None where it says nothing
    kv_cache_max     at max_tokens and the same batch
    """

    weights: int
    kv_cache: int
    kv_formula: str
    max_tokens: int | None
    kv_cache_max: int | None


@dataclass(frozen=True)
class Speed:
    """One batch size. Times in seconds, each list as measured; rates in tokens/s.

    generate         whole calls of `model.generate`, the prompt included, one a repeat
    generate_tail    of each, from its first new token to its end
    generate_tps     batch x (generated - 1) new tokens a call / their time: what a caller sees after the first token
    generate_call_tps  batch x generated new tokens a call / the whole call's time
    ttft, tpot, prefill_tps, decode_tps   of the bare forward steps, without what generate does around them
    """

    batch: int
    prompt: int
    generated: int
    generate: tuple[float, ...]
    generate_tail: tuple[float, ...]
    generate_tps: float
    generate_call_tps: float
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    ttft_median: float
    tpot_p50: float
    tpot_p99: float
    prefill_tps: float
    decode_tps: float
    read_gbs: float | None
    read_share: float | None


@dataclass(frozen=True)
class Measured:
    """One model, measured.

    stored_bytes      tensor data on disk
    stored_types      type name -> tensors of it
    stored_quantized  whether what is on disk is itself quantized
    bits_per_weight   stored bits per parameter of the unquantized model
    kernels           kernel name -> quantized linears that use it
    loaded            whether it was loaded whole; else it ran block by block, and speed is empty
    speed_how         with what in turns the runs were timed; where speed is empty, why
    faster            times the baseline's `generate_tps` at the first batch size, of runs in turns with it where there
                      were such; None where either was not timed
    quality           None of a baseline, and where it failed
    on_frontier       whether no other candidate is as small, as close to the baseline and as fast (`frontier`); None
                      without a baseline and of it
    overlap           whether the evaluation text was told apart from this model's calibration text
    problems          what failed, in words; the rest was measured
    fingerprint       of the source; manifest_sha256, conversion: of the qkit manifest, where there is one
    active_parameters  that one token is multiplied with; None where nobody counted them
    predicted         what was predicted from the headers before it ran, for this device, the engine qkit and what was
                      measured; None where nothing was asked. Parts are None where nothing supports them:
                        decode, prefill  {tokens_per_s, low, high}, first {seconds, low, high}: of the first of `speed`,
                                         bare steps; the interval holds nine in ten
                        memory           {total, parts: name -> bytes}, weights {bytes}, kv_cache {bytes}
                      each with `measured`, and `error`: predicted / measured - 1, both None where it was not measured;
                      basis: what a figure rests on, in words; problem: why parts are None, or None
    """

    name: str
    base_model: str
    architecture: str
    parameters: int
    stored_bytes: int
    stored_types: dict[str, int]
    stored_quantized: bool
    bits_per_weight: float
    dtype: str
    schemes: dict[str, int]
    kernels: dict[str, int]
    memory: Memory
    formula: Formula
    loaded: bool
    speed: tuple[Speed, ...]
    speed_how: str
    faster: float | None
    quality: Quality | None
    on_frontier: bool | None
    overlap: str
    problems: tuple[str, ...]
    fingerprint: str
    manifest_sha256: str | None
    conversion: dict[str, Any]
    active_parameters: int | None = None
    predicted: dict[str, Any] | None = None

    @property
    def quantized_as(self) -> str | None:
        """ "Q4_1, 5.74 bits per weight" where what is on disk is itself quantized, else None."""
        if not self.stored_quantized:
            return None
        kinds = self.schemes or {t: n for t, n in self.stored_types.items() if t not in FLOATS}
        main = [max(kinds, key=lambda kind: kinds[kind])] if kinds else []
        return ", ".join([*main, f"{self.bits_per_weight:.2f} bits per weight"])

    @property
    def as_baseline(self) -> str:
        """What every comparison with it has to say where it is no unquantized model; else nothing."""
        return f"against a baseline that is itself quantized ({self.quantized_as})" if self.quantized_as else ""


@dataclass(frozen=True)
class Failed:
    """A model of which nothing could be measured, and why."""

    name: str
    problem: str


@dataclass(frozen=True)
class EvaluationText:
    """What quality was measured on."""

    name: str
    sha256: str
    chunks: int
    n_ctx: int
    bos: bool


@dataclass(frozen=True)
class Profile:
    """The result of `profile`. `as_dict` is the JSON document; `schema_version` changes when its meaning does.

    models      those that were measured, as they were named, one or more
    baseline    what each of them was compared with
    failed      those that were not measured
    failures    thresholds that were missed and what failed: not empty, the exit code is 1
    """

    models: tuple[Measured, ...]
    baseline: Measured | None
    failed: tuple[Failed, ...]
    text: EvaluationText
    device: dict[str, Any]
    provenance: dict[str, Any]
    thresholds: dict[str, float]
    failures: tuple[str, ...]
    formulas: dict[str, str]
    out: str
    sweeps: tuple[Sweep, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def problems(self) -> tuple[str, ...]:
        """Of `failures`, those that are no thresholds."""
        rows = [*self.models, *([self.baseline] if self.baseline else [])]
        found = [f"{each.name}: {each.problem}" for each in self.failed]
        return (*found, *(f"{row.name}: {problem}" for row in rows for problem in row.problems))

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "measured", "passed": self.passed, **asdict(self)}
