"""Perplexity, KL divergence and top-1 agreement, streamed: both models run chunk by chunk and only one row of
figures per scored token is kept, so that no logits file exists and memory does not grow with the text.

The statistics are those of llama.cpp's `llama-perplexity --kl-divergence` (tools/perplexity/perplexity.cpp).
Two protocols, reported side by side because their numbers differ:

  "llama.cpp"  the second half of each chunk is scored: positions n_ctx/2 .. n_ctx-2
  "full"       every position is scored: 0 .. n_ctx-2

Position i is the prediction of token i+1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import QkitError

if TYPE_CHECKING:
    import numpy as np
    import torch

    # of each chunk, in order: [n_ctx, vocab], any float dtype
    Logits = Iterable["torch.Tensor"]

PROTOCOLS = ("llama.cpp", "full")
KLD_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1, 0.0)
DELTA_P_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1, 0.0)
SLICE_ELEMENTS = 4 << 20  # float32 logits held at a time for each model: 16 MiB, which stays near the caches


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """A model against its baseline, over the scored tokens of one protocol. Natural logarithms.

    perplexity           of the baseline
    ln_ratio             mean ln(PPL(model) / PPL(baseline)) with the error of the paired difference
    correlation          of the two models' per-token negative log-likelihoods; None where one is constant
    kld                  sum p_base (ln p_base - ln p_model), mean over tokens
    kld_percentiles      {"max": .., "99.9": .., ..., "median": .., ..., "min": ..}
    delta_p              mean p_model(actual) - p_base(actual)
    delta_p_rms          root mean square of the same
    same_top             share of tokens where both models' most likely token is the same
    """

    perplexity: Estimate
    ln_ratio: Estimate
    correlation: float | None
    kld: Estimate
    kld_percentiles: dict[str, float]
    delta_p: Estimate
    delta_p_rms: Estimate
    delta_p_percentiles: dict[str, float]
    same_top: Estimate


@dataclass(frozen=True)
class Scores:
    """One protocol's figures. `against` is None where no baseline was given."""

    protocol: str
    tokens: int
    perplexity: Estimate
    against: Divergence | None


@dataclass(frozen=True)
class Quality:
    """Figures of both protocols over `chunks` chunks of `n_ctx` tokens. how: whether the models were loaded for it, or
    streamed block by block."""

    chunks: int
    n_ctx: int
    vocab: int
    protocols: dict[str, Scores]
    how: str = ""

    def __getitem__(self, protocol: str) -> Scores:
        return self.protocols[protocol]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def model_logits(model: Any, tokens: torch.Tensor) -> Generator[torch.Tensor, None, None]:
    """What a transformers causal language model gives for each chunk of tokens int64 [chunks, n_ctx]."""
    import torch

    for chunk in tokens:
        with torch.inference_mode():
            found = model(input_ids=chunk.to(model.device).unsqueeze(0), use_cache=False).logits[0]
        yield found


def compare(
    base: Logits, model: Logits, tokens: torch.Tensor, progress: Callable[[float], None] | None = None
) -> Quality:
    """Score `model` against `base` on int64 tokens [chunks, n_ctx].

    progress(1) is called after each chunk. Raises QkitError where the vocabularies differ, a model gives
    something other than finite logits, or n_ctx is below 4.
    """
    return _score(base, model, tokens, progress)


def perplexity(model: Logits, tokens: torch.Tensor, progress: Callable[[float], None] | None = None) -> Quality:
    """`compare` without a baseline: perplexity alone."""
    return _score(None, model, tokens, progress)


def _score(
    base: Logits | None, model: Logits, tokens: torch.Tensor, progress: Callable[[float], None] | None
) -> Quality:
    import numpy as np
    import torch

    if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] < 4:
        raise QkitError(f"scoring needs chunks of at least 4 tokens, got shape {tuple(tokens.shape)}")
    vocab = 0
    rows = []
    sides = [model] if base is None else [model, base]
    for index, (chunk, *logits) in enumerate(zip(tokens, *sides, strict=True)):
        vocab = _check_shapes(logits, chunk)
        with torch.inference_mode():
            figures = _token_figures(logits, chunk)
        if not np.isfinite(figures).all():
            raise QkitError(
                f"chunk {index}: a model gave logits that are not finite",
                "float16 overflows in some models (Gemma): use bfloat16; or the weights are damaged",
            )
        rows.append(figures)
        if progress:
            progress(1)
    figures = np.stack(rows)  # [chunks, figures, n_ctx - 1]
    first = {"llama.cpp": tokens.shape[1] // 2, "full": 0}
    by_figure = figures.transpose(1, 0, 2)
    protocols = {p: _reduce(p, by_figure[:, :, first[p] :].reshape(len(by_figure), -1)) for p in PROTOCOLS}
    return Quality(len(tokens), tokens.shape[1], vocab, protocols)


def _check_shapes(logits: list[torch.Tensor], chunk: torch.Tensor) -> int:
    for each in logits:
        if each.ndim != 2 or each.shape[0] != len(chunk):
            raise ValueError(f"logits of shape {tuple(each.shape)} for {len(chunk)} tokens")
    if len(logits) == 2 and logits[0].shape != logits[1].shape:
        raise QkitError(
            f"the models have different vocabularies: {logits[0].shape[1]} and {logits[1].shape[1]} tokens",
            "the baseline must be the model that was quantized",
        )
    if int(chunk.max()) >= logits[0].shape[1]:
        raise QkitError(
            f"token {int(chunk.max())} is outside the vocabulary of {logits[0].shape[1]}",
            "the tokenizer belongs to another model",
        )
    return int(logits[0].shape[1])


def _token_figures(logits: list[torch.Tensor], chunk: torch.Tensor) -> np.ndarray:
    """float64 [1 or 4, n_ctx - 1]: nll of the model; then nll of the baseline, KL divergence, same top token.

    In float32, a slice of positions at a time; what is left after large terms cancel, in float64.
    KL = sum p (b - q) - (lse b - lse q) with p = softmax(b): one pass of exponentials per model, and exactly 0
    for equal logits.
    """
    import torch

    model = logits[0]
    base = logits[1].to(model.device) if len(logits) == 2 else None
    targets = chunk[1:].to(model.device).unsqueeze(1)
    step = max(1, SLICE_ELEMENTS // model.shape[1])
    parts = []
    for start in range(0, len(chunk) - 1, step):
        stop = min(start + step, len(chunk) - 1)
        actual = targets[start:stop]
        q = model[start:stop].float()
        top_q, lse_q, _ = _exponentials(q)
        nll_q = lse_q - q.gather(1, actual).squeeze(1)
        if base is None:
            parts.append(nll_q.unsqueeze(0))
            continue
        b = base[start:stop].float()
        top_b, lse_b, p = _exponentials(b)
        nll_b = lse_b - b.gather(1, actual).squeeze(1)
        p.div_(p.sum(dim=1, keepdim=True))
        difference = b - q
        kld = torch.linalg.vecdot(p, difference).double() - (lse_b - lse_q)
        if not bool(torch.isfinite(kld).all()):  # a masked token (-inf) of the baseline counts nothing
            kld = torch.where(p > 0, p * difference, 0.0).sum(dim=1).double() - (lse_b - lse_q)
        parts.append(torch.stack([nll_q, nll_b, kld.clamp_(min=0), (top_b == top_q).double()]))
    return torch.cat(parts, dim=1).cpu().numpy()


def _exponentials(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 [n, vocab] -> (most likely token [n], float64 ln sum exp [n], exp(logits - their maximum))."""
    greatest, top = logits.max(dim=1, keepdim=True)
    exponentials = (logits - greatest).exp_()
    lse = greatest.double().squeeze(1) + exponentials.sum(dim=1).double().log()
    return top.squeeze(1), lse, exponentials


def _estimate(values: np.ndarray) -> Estimate:
    """Mean and its error sqrt(var / (n - 1)), var being the population variance."""
    n = len(values)
    return Estimate(float(values.mean()), math.sqrt(float(values.var()) / (n - 1)) if n > 1 else 0.0)


def _perplexity(nll: np.ndarray) -> Estimate:
    mean = _estimate(nll)
    value = math.exp(min(mean.value, 700.0))  # e**700 is near the end of float64
    return Estimate(value, value * mean.error)


def percentiles(values: np.ndarray, wanted: tuple[float, ...]) -> dict[str, float]:
    """Linearly interpolated percentiles, keyed "max", "99.9", ..., "median", ..., "min"."""
    import numpy as np

    names = {100.0: "max", 50.0: "median", 0.0: "min"}
    results = np.percentile(values, wanted)
    return {names.get(p, f"{p:g}"): float(value) for p, value in zip(wanted, results, strict=True)}


def _reduce(protocol: str, columns: np.ndarray) -> Scores:
    import numpy as np

    nll = columns[0]
    if len(columns) == 1:
        return Scores(protocol, len(nll), _perplexity(nll), None)
    base_nll, kld, same = columns[1:]
    delta_p = np.exp(-nll) - np.exp(-base_nll)
    squared = _estimate(delta_p**2)
    rms = math.sqrt(squared.value)
    constant = nll.std() == 0 or base_nll.std() == 0
    against = Divergence(
        perplexity=_perplexity(base_nll),
        ln_ratio=_estimate(nll - base_nll),
        correlation=None if constant else float(np.corrcoef(nll, base_nll)[0, 1]),
        kld=_estimate(kld),
        kld_percentiles=percentiles(kld, KLD_PERCENTILES),
        delta_p=_estimate(delta_p),
        delta_p_rms=Estimate(rms, 0.5 * squared.error / rms if rms else 0.0),
        delta_p_percentiles=percentiles(delta_p, DELTA_P_PERCENTILES),
        same_top=_estimate(same),  # of zeros and ones: sqrt(p (1 - p) / (n - 1))
    )
    return Scores(protocol, len(nll), _perplexity(nll), against)
