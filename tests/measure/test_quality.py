"""Quality figures against a naive float64 oracle written from the definitions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from qkit.errors import QkitError
from qkit.measure import quality

LN = math.log
NAMES = ["max", "99.9", "99", "95", "90", "median", "10", "5", "1", "0.1", "min"]


def fixed(*tables):
    """The logits [n_ctx, vocab] of each chunk, as given."""
    return [torch.as_tensor(t) for t in tables]


def oracle(base, model, tokens, start):
    """Per token, in Python floats: (nll base, nll model, kld, delta p, same top)."""
    rows = []
    for b_table, m_table, chunk in zip(base, model, tokens, strict=True):
        for i in range(start, len(chunk) - 1):
            b, m = (np.asarray(t[i], dtype=np.float64) for t in (b_table, m_table))
            b, m = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (b, m))
            target = int(chunk[i + 1])
            kld = float((np.exp(b) * (b - m)).sum())
            delta = math.exp(m[target]) - math.exp(b[target])
            rows.append((-b[target], -m[target], kld, delta, float(b.argmax() == m.argmax())))
    return np.array(rows)


@pytest.mark.parametrize(("chunks", "n_ctx", "vocab"), [(1, 4, 3), (3, 9, 50), (2, 16, 1000), (4, 7, 129)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_every_figure_equals_the_oracle(chunks, n_ctx, vocab, scale):
    rng = np.random.default_rng(vocab)
    base = rng.normal(size=(chunks, n_ctx, vocab)).astype(np.float32) * 4
    model = base + rng.normal(size=base.shape).astype(np.float32) * scale
    tokens = torch.from_numpy(rng.integers(0, vocab, size=(chunks, n_ctx)))
    result = quality.compare(fixed(*base), fixed(*model), tokens)
    for protocol, start in (("full", 0), ("llama.cpp", n_ctx // 2)):
        rows = oracle(base, model, tokens.tolist(), start)
        n = len(rows)
        nll_b, nll_m, kld, delta, same = rows.T
        got = result[protocol]
        assert got.tokens == n == chunks * (n_ctx - 1 - start)
        sem = [math.sqrt(x.var() / (n - 1)) if n > 1 else 0.0 for x in (nll_m, nll_b, nll_m - nll_b, kld, delta, same)]
        close(got.perplexity, math.exp(nll_m.mean()), math.exp(nll_m.mean()) * sem[0])
        against = got.against
        close(against.perplexity, math.exp(nll_b.mean()), math.exp(nll_b.mean()) * sem[1])
        close(against.ln_ratio, (nll_m - nll_b).mean(), sem[2])
        close(against.kld, kld.mean(), sem[3])
        close(against.delta_p, delta.mean(), sem[4])
        close(against.same_top, same.mean(), sem[5])
        assert against.delta_p_rms.value == pytest.approx(math.sqrt((delta**2).mean()), rel=1e-4, abs=1e-6)
        assert list(against.kld_percentiles) == NAMES
        for name, value in against.kld_percentiles.items():
            p = float({"max": 100, "median": 50, "min": 0}.get(name, name))
            assert value == pytest.approx(np.percentile(kld, p), rel=1e-4, abs=3e-7)
        if n > 1:
            assert against.correlation == pytest.approx(np.corrcoef(nll_m, nll_b)[0, 1], abs=1e-5)


def close(estimate, value, error):
    assert estimate.value == pytest.approx(value, rel=1e-4, abs=3e-7)
    assert estimate.error == pytest.approx(error, rel=1e-3, abs=3e-7)


def test_hand_made_distributions():
    # One scored position in "llama.cpp" (n_ctx 4: position 2), three in "full".
    base = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.75, 0.25], [0.5, 0.5]]).log()
    model = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]).log()
    result = quality.compare(fixed(base), fixed(model), torch.tensor([[0, 0, 1, 0]]))
    half = result["llama.cpp"]
    assert half.tokens == 1
    assert half.against.kld.value == pytest.approx(0.75 * LN(1.5) + 0.25 * LN(0.5), rel=1e-6)
    assert half.perplexity.value == pytest.approx(2.0) and half.against.perplexity.value == pytest.approx(4 / 3)
    assert half.against.delta_p.value == pytest.approx(-0.25)
    full = result["full"]
    klds = [0.0, 0.5 * LN(2) + 0.5 * LN(2 / 3), 0.75 * LN(1.5) + 0.25 * LN(0.5)]
    assert full.against.kld.value == pytest.approx(sum(klds) / 3, rel=1e-6)
    assert full.against.kld_percentiles["max"] == pytest.approx(max(klds), rel=1e-6)
    assert full.against.kld_percentiles["median"] == pytest.approx(sorted(klds)[1], rel=1e-6)
    assert full.perplexity.value == pytest.approx(math.exp((LN(2) + LN(4 / 3) + LN(2)) / 3), rel=1e-6)
    assert full.against.same_top.value == pytest.approx(2 / 3)


def test_equal_models_diverge_by_exactly_nothing():
    table = torch.randn(2, 8, 301, dtype=torch.bfloat16)
    result = quality.compare(fixed(*table), fixed(*table), torch.randint(0, 301, (2, 8)))
    against = result["full"].against
    assert against.kld == quality.Estimate(0.0, 0.0) and against.same_top == quality.Estimate(1.0, 0.0)
    assert set(against.kld_percentiles.values()) == {0.0}
    assert against.ln_ratio == quality.Estimate(0.0, 0.0) and against.delta_p_rms.value == 0.0
    json.dumps(result.as_dict(), allow_nan=False)


def test_a_masked_token_counts_nothing():
    torch.manual_seed(5)
    base = torch.randn(6, 40)
    base[:, 7] = -math.inf
    model = base + 0.1 * torch.randn(6, 40)
    kept = [i for i in range(40) if i != 7]
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    got = quality.compare(fixed(base), fixed(model), tokens)["full"].against.kld.value
    want = quality.compare(fixed(base[:, kept]), fixed(model[:, kept]), tokens)["full"].against.kld.value
    assert got == pytest.approx(want, rel=1e-5, abs=3e-7)


def test_perplexity_alone_is_that_of_the_comparison():
    table, other = torch.randn(2, 12, 60), torch.randn(2, 12, 60)
    tokens = torch.randint(0, 60, (2, 12))
    calls = []
    alone = quality.perplexity(fixed(*table), tokens, calls.append)
    both = quality.compare(fixed(*other), fixed(*table), tokens)
    assert alone["full"].against is None and calls == [1, 1]
    for protocol in quality.PROTOCOLS:
        assert alone[protocol].perplexity == both[protocol].perplexity
    json.dumps(alone.as_dict(), allow_nan=False)


@pytest.mark.parametrize("step", [1, 64, 10**9])
def test_slices_do_not_change_the_figures(monkeypatch, step):
    torch.manual_seed(3)
    base, model, tokens = torch.randn(9, 64), torch.randn(9, 64), torch.randint(0, 64, (1, 9))
    reference = quality.compare(fixed(base), fixed(model), tokens)
    monkeypatch.setattr(quality, "SLICE_ELEMENTS", step)
    sliced = quality.compare(fixed(base), fixed(model), tokens)
    assert sliced["full"].against.kld.value == pytest.approx(reference["full"].against.kld.value, rel=1e-6)
    assert sliced["full"].perplexity.value == pytest.approx(reference["full"].perplexity.value, rel=1e-6)


def test_a_transformers_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, **sizes)
    base = LlamaForCausalLM(config).eval()
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 300, (2, 16))
    result = quality.compare(quality.model_logits(base, tokens), quality.model_logits(model, tokens), tokens)
    with torch.no_grad():
        tables = [[m.double()(input_ids=c[None]).logits[0].numpy() for c in tokens] for m in (base, model)]
    rows = oracle(*tables, tokens.tolist(), 0)
    assert result["full"].against.kld.value == pytest.approx(rows[:, 2].mean(), rel=1e-4)
    assert result["full"].perplexity.value == pytest.approx(math.exp(rows[:, 1].mean()), rel=1e-4)
    assert result.vocab == 300


def test_refusals():
    tokens = torch.tensor([[0, 1, 2, 1]])
    table = torch.randn(4, 5)
    with pytest.raises(QkitError, match="different vocabularies: 5 and 6"):
        quality.compare(fixed(torch.randn(4, 6)), fixed(table), tokens)
    for bad in (math.nan, math.inf):
        broken = table.clone()
        broken[1, 2] = bad
        with pytest.raises(QkitError, match=r"chunk 0.*not finite"):
            quality.compare(fixed(table), fixed(broken), tokens)
        with pytest.raises(QkitError, match=r"chunk 0.*not finite"):
            quality.perplexity(fixed(broken), tokens)
    with pytest.raises(QkitError, match="outside the vocabulary of 5"):
        quality.perplexity(fixed(table), torch.tensor([[0, 1, 9, 1]]))
    for shape in ((0, 8), (1, 3), (8,)):
        with pytest.raises(QkitError, match="at least 4 tokens"):
            quality.perplexity(fixed(table), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_percentiles_are_linearly_interpolated(n):
    values = np.random.default_rng(n).normal(size=n)
    ordered = sorted(values)

    def interpolated(p):
        position = p / 100 * (n - 1)
        low = int(position)
        high = min(low + 1, n - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    got = quality.percentiles(values, quality.DELTA_P_PERCENTILES)
    for value, p in zip(got.values(), quality.DELTA_P_PERCENTILES, strict=True):
        assert value == pytest.approx(interpolated(p))
