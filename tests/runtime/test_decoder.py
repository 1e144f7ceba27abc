"""The decoding step in one call: as close to the exact model as the model's own step, on any cache it is handed."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from steps import error, own, packed, steps_taken

from qkit.kernels import backend
from qkit.kernels.cpu.decoder import Cache, decode, dense
from qkit.models.cache_name import cache_name
from qkit.runtime import as_decoder, decoder, growing_cache, load

pytestmark = pytest.mark.skipif(backend().startswith("torch"), reason="no C++ library")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return get


def tokens(model: Any, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def steps(forward: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits after each of ids' columns, fed one by one: float32 [rows, steps, vocabulary]."""
    found = []
    for i in range(ids.shape[1]):
        given: dict[str, Any] = {"input_ids": ids[:, i : i + 1], "past_key_values": cache}
        if mask is not None:
            seen = mask[:, : mask.shape[1] - ids.shape[1] + i + 1]
            given |= {"attention_mask": seen, "position_ids": (seen.cumsum(-1) - 1)[:, -1:]}
        found.append(forward(**given).logits[:, -1].float())
    return torch.stack(found, 1)


@torch.no_grad()
def test_whatever_the_cache_is_called(folders: Any, monkeypatch: Any) -> None:
    """transformers renamed the argument in 5.24: callers may use either name there, and `generate` uses the new one."""
    model = packed(folders("llama"))
    calls = []
    original = decoder._Runner.step
    monkeypatch.setattr(decoder._Runner, "step", lambda *given: calls.append(original(*given)) or calls[-1])
    prompt, one = tokens(model, 1, 12), tokens(model, 1, 1, 1)
    model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert [c is not None for c in calls] == 6 * [True]
    kept = own(model)(prompt, use_cache=True)[cache_name()]
    found = []
    for name in {"past_key_values", cache_name()}:
        output = model(input_ids=one, **{name: copy.deepcopy(kept)})
        assert calls[-1] is output and output[name] is output.past_key_values
        found.append(output.logits)
    assert all(torch.equal(each, found[0]) for each in found)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("quantized", [True, False])
def test_as_close_as_the_models_own_step(
    folders: Any, family: str, rows: int, quantized: bool, monkeypatch: Any
) -> None:
    make = packed if quantized else (lambda folder, dtype=torch.bfloat16: load(folder, device="cpu", dtype=dtype))
    model, exact = make(folders(family)), make(folders(family), torch.float32)
    taken = steps_taken(monkeypatch)
    # 75 and more entries: beyond the sliding windows of 64
    prompt, more = tokens(model, rows, 70), tokens(model, rows, 8, 1)
    truth = steps(own(exact), own(exact)(prompt, use_cache=True).past_key_values, more)
    plain_cache = own(model)(prompt, use_cache=True).past_key_values
    fast_cache = copy.deepcopy(plain_cache)
    plain = steps(own(model), plain_cache, more)
    fast = steps(model, fast_cache, more)
    assert taken == 8 * [True]
    assert error(fast, truth) <= 1.2 * error(plain, truth) + 1e-3
    assert fast_cache.get_seq_length() == plain_cache.get_seq_length() == 78
    for ours, theirs in zip(fast_cache.layers, plain_cache.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape and isinstance(ours, type(theirs))
        assert error(ours.keys.float(), theirs.keys.float()) < 0.03
        assert error(ours.values.float(), theirs.values.float()) < 0.03
    # Copies of a cache are caches of their own.
    copied, other = copy.deepcopy(fast_cache), tokens(model, rows, 2, 9)
    alone = copy.deepcopy(plain_cache)
    assert error(steps(model, copied, other), steps(own(model), alone, other)) < 0.05
    assert fast_cache.get_seq_length() == 78 and copied.get_seq_length() == 80
    # The cache goes on in the model's own forward, several tokens at once, and comes back.
    third = tokens(model, rows, 5, 2)
    a, b = (
        model(third, past_key_values=fast_cache).logits.float(),
        own(model)(third, past_key_values=plain_cache).logits,
    )
    assert error(a, b.float()) < 0.05
    again = tokens(model, rows, 2, 3)
    assert error(steps(model, fast_cache, again), steps(own(model), plain_cache, again)) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padding_on_the_left_is_not_seen(folders: Any, family: str) -> None:
    model = packed(folders(family))
    prompt, more = tokens(model, 2, 70), tokens(model, 2, 6, 1)
    mask = torch.ones(2, 76, dtype=torch.long)
    mask[1, :9] = 0
    begin = {"attention_mask": mask[:, :70], "position_ids": (mask[:, :70].cumsum(-1) - 1).clamp(min=0)}
    cache = own(model)(prompt, use_cache=True, **begin).past_key_values
    fast = steps(model, copy.deepcopy(cache), more, mask)
    plain = steps(own(model), cache, more, mask)
    assert error(fast, plain) < 0.05
    alone = own(model)(prompt[1:, 9:], use_cache=True).past_key_values
    assert error(fast[1:], steps(model, alone, more[1:])) < 0.05


@torch.no_grad()
def test_generate_whatever_the_strategy(folders: Any) -> None:
    """Greedy, sampled and beam search run through; where the two forwards agree on every token, so does the text."""
    model = packed(folders("llama"))
    prompt = tokens(model, 2, 12)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
    fast = model.generate(prompt, do_sample=False, **options)
    assert fast.shape == (2, 32)
    # What it chose is, by the model's own forward, within rounding of the best choice.
    scores = own(model)(fast).logits[:, 11:-1].float()
    chosen = scores.gather(-1, fast[:, 12:, None])[..., 0]
    assert (scores.amax(-1) - chosen).max() <= 0.05 * scores.std()
    assert model.generate(prompt, num_beams=3, do_sample=False, **options).shape == (2, 32)
    torch.manual_seed(0)
    assert model.generate(prompt, do_sample=True, top_k=5, **options).shape == (2, 32)


@torch.no_grad()
def test_a_cache_grows_past_its_headroom(folders: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(growing_cache, "HEADROOM", 2)
    monkeypatch.setattr(decoder, "_MORE_POSITIONS", 16)
    model = packed(folders("llama"))
    prompt, more = tokens(model, 1, 10), tokens(model, 1, 30, 1)
    cache = own(model)(prompt, use_cache=True).past_key_values
    fast = steps(model, copy.deepcopy(cache), more)
    assert error(fast, steps(own(model), cache, more)) < 0.05


@torch.no_grad()
def test_a_replaced_weight_is_noticed(folders: Any) -> None:
    model = packed(folders("llama"))
    prompt, more = tokens(model, 1, 10), tokens(model, 1, 1, 1)
    before = steps(model, model(prompt, use_cache=True).past_key_values, more)
    other = packed(folders("llama")).model.layers[1].mlp.down_proj
    other.load_state_dict({**other.state_dict(), "packed": torch.zeros_like(other.state_dict()["packed"])})
    model.model.layers[1].mlp.down_proj = other
    cache = model(prompt, use_cache=True).past_key_values
    after = steps(model, copy.deepcopy(cache), more)
    assert error(after, before) > 0.05 and error(after, steps(own(model), cache, more)) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("held", ["as loaded", "float32", "strided"])
def test_a_write_to_the_bias_of_a_packed_linear_counts(folders: Any, held: str, monkeypatch: Any) -> None:
    """Past autograd, where it counts no version. A bias that the step would have to copy is left to the model."""
    taken = steps_taken(monkeypatch)
    model = packed(folders("qwen2"))
    layers = [layer.self_attn.q_proj for layer in model.model.layers]
    for layer in layers:
        layer.bias = {
            "as loaded": layer.bias.clone(), "float32": layer.bias.float(),
            "strided": layer.bias.repeat_interleave(2)[::2],
        }[held]  # fmt: skip
    prompt, more = tokens(model, 1, 10), tokens(model, 1, 1, 1)
    cache = own(model)(prompt, use_cache=True).past_key_values
    before = steps(model, copy.deepcopy(cache), more)
    for layer in layers:
        layer.bias.data.add_(torch.linspace(-9, 9, layer.bias.numel()))
    after = steps(model, copy.deepcopy(cache), more)
    assert taken == [held == "as loaded"] * 2
    assert error(after, before) > 0.05 and error(after, steps(own(model), cache, more)) < 0.05


def test_everything_else_is_left_to_the_model(folders: Any) -> None:
    model = packed(folders("llama"))
    prompt, one = tokens(model, 1, 10), tokens(model, 1, 1, 1)
    assert "input_ids" in inspect.signature(model.forward).parameters  # generate() looks
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        states = model(input_ids=one, past_key_values=copy.deepcopy(cache), output_hidden_states=True)
        assert len(states.hidden_states) == model.config.num_hidden_layers + 1
        assert isinstance(model(input_ids=one, past_key_values=copy.deepcopy(cache), return_dict=False), tuple)
        embeds = model.get_input_embeddings()(one)
        assert model(inputs_embeds=embeds, past_key_values=copy.deepcopy(cache)).logits.shape[1] == 1
        hole = torch.ones(1, 11, dtype=torch.long)
        hole[0, 4] = 0
        masked = model(input_ids=one, past_key_values=copy.deepcopy(cache), attention_mask=hole).logits
        assert (
            error(masked.float(), own(model)(input_ids=one, past_key_values=cache, attention_mask=hole).logits) < 1e-6
        )
    model.get_input_embeddings().weight.requires_grad_()
    assert model(input_ids=one, past_key_values=copy.deepcopy(cache)).logits.requires_grad


def test_what_it_does_not_know_it_says(folders: Any) -> None:
    model = packed(folders("llama"))
    assert as_decoder.unsupported(model) is None
    assert "float32" in str(as_decoder.unsupported(load(folders("llama"), device="cpu", dtype="float32")))
    model.config.model_type = "olmo"
    assert "olmo" in str(as_decoder.unsupported(model))
    model = packed(folders("llama"))
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    assert "Sequential" in str(as_decoder.unsupported(model))


@pytest.mark.parametrize("shape", [(5, 7), (33, 64), (130, 200)])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_dense_rounds_once(shape: tuple[int, int], rows: int) -> None:
    weight, bias, x = (
        torch.randn(shape).bfloat16(),
        torch.randn(shape[0]).bfloat16(),
        torch.randn(rows, shape[1]).bfloat16(),
    )
    exact = x.double() @ weight.double().T + bias.double()
    y = dense(x, weight, bias)
    assert (y.double() - exact).norm() <= (exact.bfloat16().double() - exact).norm() + 1e-5 * exact.norm()
    with pytest.raises(ValueError, match="the weight"):
        dense(x[:, :-1].contiguous(), weight)
    with pytest.raises(TypeError, match="float32"):
        dense(x.float(), weight)
    with pytest.raises(TypeError, match="contiguous"):
        dense(torch.empty(shape[1], rows + 1).bfloat16().t(), weight)


@torch.no_grad()
def test_decode_refuses_what_does_not_fit(folders: Any) -> None:
    model = packed(folders("llama"))
    built = as_decoder.build(model, 16)
    empty = tuple(torch.zeros(1, 2, 4, 32).bfloat16() for _ in range(2))
    cache = Cache.of(empty, empty)
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert decode(built, cache, 3, one, one, zero).shape == (1, model.config.vocab_size)
    with pytest.raises(ValueError, match="sizes do not fit"):
        decode(built, cache, 4, one, one, zero)  # no room
    with pytest.raises(ValueError, match="sizes do not fit"):
        decode(built, cache, 1, one * model.config.vocab_size, one, zero)
    with pytest.raises(ValueError, match="beyond the rotary tables"):
        decode(built, cache, 1, one, one * 16, zero)
    with pytest.raises(ValueError, match="2 layers and 1 sequences"):
        decode(built, cache, 1, one.repeat(2), one.repeat(2), zero.repeat(2))
