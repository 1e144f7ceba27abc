"""What a profile holds. Every figure here was measured on this machine unless its name says formula."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .quality import Quality

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Memory:
    """Bytes, by part. Weights are exact sums over the loaded model's tensors.

    packed, embeddings, unquantized  parts of `weights`: quantized linears (codes, scales, zeros); the input
                         embedding and an output head tied to it; everything else
    kv_cache             summed over the cache's tensors after the decode run, `kv_tokens` tokens a sequence
    kv_cache_formula     the formula at the same length
    kv_cache_context     the formula at the whole context and the largest batch
    activations          peak above weights and cache while a prompt of `context` tokens runs
    activations_source   how that peak was seen
    process_before, process_after   resident bytes of the process around loading; None where unknown
    total                weights + kv_cache_context + activations
    """

    weights: int
    packed: int
    embeddings: int
    unquantized: int
    kv_cache: int
    kv_tokens: int
    kv_cache_formula: int
    kv_cache_context: int
    kv_formula: str
    activations: int
    activations_source: str
    process_before: int | None
    process_after: int | None
    total: int
    device_bytes: int
    fits: bool


@dataclass(frozen=True)
class Speed:
    """One batch size. Times in seconds, each list as measured; rates in tokens/s."""

    batch: int
    prompt: int
    generated: int
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
class Row:
    """One model, measured.

    stored_bytes      tensor data on disk
    bits_per_weight   stored bits per parameter of the unquantized model
    kernels           kernel name -> quantized linears that use it
    """

    name: str
    base_model: str
    architecture: str
    parameters: int
    stored_bytes: int
    bits_per_weight: float
    dtype: str
    schemes: dict[str, int]
    kernels: dict[str, int]
    memory: Memory
    speed: tuple[Speed, ...]


@dataclass(frozen=True)
class EvaluationText:
    """What quality was measured on, and whether it was told apart from the calibration text."""

    name: str
    sha256: str
    chunks: int
    n_ctx: int
    bos: bool
    overlap: str


@dataclass(frozen=True)
class Profile:
    """The result of `profile`. `as_dict` is the JSON document; `schema_version` changes when its meaning does."""

    model: Row
    baseline: Row | None
    quality: Quality
    text: EvaluationText
    device: dict[str, Any]
    provenance: dict[str, Any]
    thresholds: dict[str, float]
    failures: tuple[str, ...]
    formulas: dict[str, str]
    out: str
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "measured", "passed": self.passed, **asdict(self)}
