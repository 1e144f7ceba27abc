"""Keys and values on their way into the cache: rounded for every architecture as a cache that rounds would."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import FAMILIES, TINY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from qkit.errors import QkitError
from qkit.models import kv_cache, skeleton

SCALES = {"k_scale": 0.003, "v_scale": 0.0004}
EXTRA = {"gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 8}, "gemma3_text": {"sliding_window": 8},
         "mistral": {"sliding_window": 8}}  # fmt: skip


def e4m3() -> torch.Tensor:
    """Every finite value of the type, in order, by its definition: 4 bits of exponent (bias 7) and 3 of fraction."""
    positive = [m / 8 * 2.0**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted({*positive, *(-x for x in positive)}), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_is_the_nearest_value_of_the_type_and_stays_so(dtype):
    x = (torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    x[0, 0, :3] = torch.tensor([0.0, 100.0, -100.0])
    scale = torch.tensor([0.01], dtype=torch.bfloat16)
    found = kv_cache.rounded(x, scale)
    values = e4m3() * scale.double()
    nearest = values[(x.double().flatten()[:, None] - values).abs().argmin(1)].view(x.shape).to(dtype)
    assert found.dtype == dtype and torch.equal(found, nearest)
    assert found[0, 0, :3].tolist() == [0.0, float(values.max().to(dtype)), float(values.min().to(dtype))]
    assert torch.equal(kv_cache.rounded(found, scale), found)


class RoundingCache(DynamicCache):
    def update(self, keys, values, layer, *args, **kwargs):
        pair = (kv_cache.rounded(x, torch.tensor([s])) for x, s in zip((keys, values), SCALES.values(), strict=True))
        return super().update(*pair, layer, *args, **kwargs)


def tiny(model_type: str):
    torch.manual_seed(0)
    given = {**TINY, "pad_token_id": 0, **FAMILIES.get(model_type, {}), **EXTRA.get(model_type, {})}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**given), dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def fill(model) -> None:
    for attention in kv_cache.attentions(model).values():
        for name, value in SCALES.items():
            attention._buffers[name] = torch.tensor([value])


@pytest.mark.parametrize("model_type", skeleton.ARCHITECTURES)
def test_rounded_as_by_a_cache_that_rounds(model_type):
    """Without a cache, with one, and token by token beyond a window."""
    plain = tiny(model_type)
    model = copy.deepcopy(plain)
    kv_cache.add_rounding(model)
    assert len(kv_cache.attentions(model)) == 2 and kv_cache.is_rounded(model)
    assert {n for n, b in model.named_buffers() if b.is_meta} == {
        f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in SCALES
    }
    fill(model)
    kv_cache.check_scales(model)
    ids = torch.randint(0, 260, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain(ids, past_key_values=RoundingCache(config=plain.config)).logits
        assert not torch.allclose(expected, plain(ids).logits, atol=1e-3)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        out = model(ids[:, :12], use_cache=True)
        for i in range(12, 20):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values)
        # Sums in another order may put a value on the other side of the middle between two of e4m3.
        assert float((out.logits[:, -1] - expected[:, -1]).norm() / expected[:, -1].norm()) < 1e-3
        again = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(again(ids).logits, expected)
        kv_cache.remove_rounding(model)
        assert not kv_cache.is_rounded(model) and torch.equal(model(ids).logits, plain(ids).logits)


def test_gradients_pass_as_if_nothing_were_rounded():
    x = torch.randn(4, 4, requires_grad=True)
    kv_cache._Rounded.apply(x, torch.tensor([0.01])).mul(torch.arange(16.0).view(4, 4)).sum().backward()
    assert torch.equal(x.grad, torch.arange(16.0).view(4, 4))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_named(value):
    model = tiny("llama")
    kv_cache.add_rounding(model)
    fill(model)
    kv_cache.attentions(model)["model.layers.1.self_attn"].v_scale[0] = value
    with pytest.raises(QkitError, match=r"layers\.1\.self_attn\.v_scale is .*not a positive number"):
        kv_cache.check_scales(model)
