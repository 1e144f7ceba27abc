"""The fast decoding step does not pass over what it does not look at: then the model's own forward runs."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import make_model
from steps import steps_taken
from torch import nn

from qkit.kernels import backend
from qkit.models.cache_name import cache_name
from qkit.runtime import decoder, load

pytestmark = pytest.mark.skipif(backend().startswith("torch"), reason="the fast step needs the C++ library")


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / request.param, request.param)


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder, device="cpu")


def prompt(rows: int = 1, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(3))


def recomputed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last logits, by the model's own forward over the whole text."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -1].float()


def stepped(model: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """The last logits, by steps of one token after the first half."""
    half = ids.shape[1] // 2
    with torch.no_grad():
        out = model(input_ids=ids[:, :half], use_cache=True)
        for i in range(half, ids.shape[1]):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
    return out.logits[:, -1].float()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 0.03


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * -50)


def _pre_hook(model: Any) -> None:
    model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))


def _norm_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(3).add_(1)


def _norm_replaced(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(torch.full_like(model.model.norm.weight, 0.5), requires_grad=False)


def _linear_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-50)


def _embedding_in_place(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[:250].copy_(model.get_input_embeddings().weight[:250].flip(-1))


class _Louder(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * -50


def _stand_in(model: Any) -> None:
    layer = model.model.layers[0]
    layer.input_layernorm = _Louder(layer.input_layernorm)


def _assigned_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) * -50


def _through_data(pick: Any) -> Any:
    """A write past autograd: it counts no version."""

    def change(model: Any) -> None:
        tensor = pick(model).data
        tensor.add_(torch.linspace(-3, 3, tensor.shape[-1]))

    change.__name__ = pick.__name__
    return change


def _input_norm(model: Any) -> torch.Tensor:
    return model.model.layers[0].input_layernorm.weight  # type: ignore[no-any-return]


def _mlp_norm(model: Any) -> torch.Tensor:
    return model.model.layers[1].post_attention_layernorm.weight  # type: ignore[no-any-return]


def _last_norm(model: Any) -> torch.Tensor:
    return model.model.norm.weight  # type: ignore[no-any-return]


def _embedding(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight[:250]  # type: ignore[no-any-return]


def _head(model: Any) -> torch.Tensor:
    return model.lm_head.weight  # type: ignore[no-any-return]


def _other_norm(model: Any) -> None:
    norm = nn.LayerNorm(model.config.hidden_size, dtype=torch.bfloat16).eval()
    norm.weight.data.copy_(torch.linspace(-3, 3, norm.weight.numel()))
    model.model.layers[0].input_layernorm = norm.requires_grad_(False)


def _other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanhshrink()


def _subclass(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.__class__ = type("Mine", (type(mlp),), {"forward": lambda self, x: x * 50})


def _forward_of_a_class(model: Any) -> None:
    """Of a class of this model alone: others are not to be changed."""
    mlp = model.model.layers[0].mlp
    kind = type(type(mlp).__name__, (type(mlp),), {"__module__": type(mlp).__module__})
    mlp.__class__ = kind
    recomputed(model, prompt()), stepped(model, prompt())
    kind.forward = lambda self, x: x * 50


def _epsilon(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 100.0)


def _scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 30.0


def _order(model: Any) -> None:
    model.model.layers = nn.ModuleList([model.model.layers[1], model.model.layers[0]])


def _fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 1


def _registered_attention(model: Any) -> None:
    def ones(module: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.ones_like(q).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("ones", ones)
    model.set_attn_implementation("ones")


def _renormalized(model: Any) -> None:
    model.get_input_embeddings().max_norm = 0.05


def _rotation(model: Any) -> None:
    for name, buffer in model.model.rotary_emb.named_buffers():
        if not name.startswith("original"):
            buffer.data.add_(1.0)


def _rotary_scale(model: Any) -> None:
    for name in [name for name in vars(model.model.rotary_emb) if name.endswith("attention_scaling")]:
        setattr(model.model.rotary_emb, name, 2.5)


STAND_INS = [
    _other_norm,
    _other_activation,
    _subclass,
    _forward_of_a_class,
    _order,
    _fewer_layers,
    _registered_attention,
]
SETTINGS = [_epsilon, _scaling, _renormalized, _rotation, _rotary_scale]
WRITES = [_through_data(pick) for pick in (_input_norm, _mlp_norm, _last_norm, _embedding, _head)]
CHANGES = [*WRITES, *STAND_INS, *SETTINGS, _hook, _pre_hook, _norm_in_place, _norm_replaced, _linear_in_place,
           _embedding_in_place, _assigned_forward]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before the first step", "between two"])
def test_a_change_of_the_model_counts(model: Any, change: Any, when: str) -> None:
    ids = prompt()
    before = stepped(model, ids) if when == "between two" else recomputed(model, ids)
    change(model)
    after = recomputed(model, ids)
    assert not close(before, after)
    assert close(stepped(model, ids), after)


@pytest.mark.parametrize(("family", "name"), [("qwen3", "q_norm.weight"), ("qwen3", "k_norm.weight"),
                                              ("qwen2", "q_proj.bias"), ("gemma3_text", "q_norm.weight")])  # fmt: skip
def test_writes_to_the_small_tensors_of_attention_count(tmp_path: Path, family: str, name: str) -> None:
    model, ids = load(make_model(tmp_path / "m", family), device="cpu"), prompt()
    before = stepped(model, ids)
    for layer in model.model.layers:
        module, _, kind = name.partition(".")
        # Channels of different sizes: a norm is blind to one factor for all.
        tensor = getattr(layer.self_attn.get_submodule(module), kind).data
        tensor.add_(torch.linspace(-9, 9, tensor.numel()))
    after = recomputed(model, ids)
    assert not close(before, after) and close(stepped(model, ids), after)


def test_global_hooks_count(model: Any, monkeypatch: Any) -> None:
    taken = steps_taken(monkeypatch)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        stepped(model, prompt())
    finally:
        handle.remove()
    assert not any(taken)
    stepped(model, prompt())
    assert any(taken)


def test_an_adapter_counts(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    ids = prompt()
    before = stepped(model, ids)
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False, r=8, lora_alpha=64)
    adapted = get_peft_model(model, config).eval()
    after = recomputed(adapted, ids)
    assert not close(before, after)
    assert close(stepped(adapted, ids), after)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_runs_its_own_weights(model: Any, how: str) -> None:
    ids = prompt()
    expected = stepped(model, ids)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert close(stepped(other, ids), expected)
    with torch.no_grad():
        other.model.norm.weight.fill_(0.0 if "llama" in model.config.model_type else -1.0)
    assert float(stepped(other, ids).abs().max()) == 0.0
    assert torch.equal(stepped(model, ids), expected)


def test_threads_share_one_plan(model: Any, monkeypatch: Any) -> None:
    """The first steps of several threads, each with a cache of its own, and a change of the model between."""
    built, together, build = [], threading.Barrier(3), decoder.build

    def slow(*args: Any) -> Any:
        built.append(threading.get_ident())
        with suppress(threading.BrokenBarrierError):  # the others wait for the lock
            together.wait(0.3)
        return build(*args)

    monkeypatch.setattr(decoder, "build", slow)
    for change in (lambda: None, lambda: _norm_in_place(model)):
        change()
        built.clear()
        together.reset()
        texts = [prompt()[:, i:] for i in range(3)]
        expected = [recomputed(model, ids) for ids in texts]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda ids: stepped(model, ids), texts))
        assert all(map(close, found, expected)) and len(built) == 1


def test_what_the_step_cannot_give_is_the_models(model: Any, monkeypatch: Any) -> None:
    ids = prompt()
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True)[cache_name()]
        taken = steps_taken(monkeypatch)
        one = {"input_ids": ids[:, :1], "use_cache": True}
        twice = model(**one, **{cache_name(): copy.deepcopy(cache)}, logits_to_keep=torch.tensor([0, 0]))
        assert twice.logits.shape[:2] == (1, 2)
        for position in (-3, 10**6):  # of which no table is made
            at = {"position_ids": torch.tensor([[position]])}
            found = model(**one, **at, **{cache_name(): copy.deepcopy(cache)}).logits
            decoder.detach(model)
            assert torch.equal(found, model(**one, **at, **{cache_name(): copy.deepcopy(cache)}).logits)
            decoder.attach(model)
    assert not any(taken)


def test_a_model_is_freed(folder: Path) -> None:
    model = load(folder, device="cpu")
    stepped(model, prompt())
    alive = weakref.ref(model.model.layers[0].mlp)
    del model
    gc.collect()
    assert alive() is None


def test_detach(model: Any, monkeypatch: Any) -> None:
    ids = prompt()
    expected = recomputed(model, ids)
    base = type(model).__mro__[1]
    decoder.detach(model)
    decoder.detach(model)
    assert type(model) is base
    taken = steps_taken(monkeypatch)
    assert close(stepped(model, ids), expected) and not taken


CACHE_CALLS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
}


@pytest.mark.parametrize("length", [20, 63, 64, 65, 100])  # gemma's window is 64
@pytest.mark.parametrize("call", CACHE_CALLS)
def test_cache_methods_between_steps(model: Any, call: str, length: int) -> None:
    ids = prompt(2, length + 6)
    with torch.no_grad():
        out = model(input_ids=ids[:, : length - 2], use_cache=True)
        for i in (length - 2, length - 1):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        cache = out.past_key_values
        CACHE_CALLS[call](cache)
        rows = torch.tensor([0, 0, 1, 1] if call == "repeat" else [1, 0])
        assert cache.get_seq_length() == length
        ids = ids[rows]
        for i in range(length, length + 6):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    assert close(out.logits[:, -1].float(), recomputed(model, ids))


@pytest.mark.parametrize("window", [8, 512])
def test_beam_search(tmp_path: Path, window: int) -> None:
    folder = make_model(tmp_path / "m", "gemma3_text", sliding_window=window)
    ids = prompt(1, 24)
    options = dict(num_beams=3, max_new_tokens=8, do_sample=False, pad_token_id=0)
    model = load(folder, device="cpu")
    fast = model.generate(ids, **options)
    decoder.detach(model)
    assert torch.equal(fast, model.generate(ids, **options))


def test_a_cache_can_be_pickled(model: Any) -> None:
    ids = prompt(1, 80)
    with torch.no_grad():
        out = model(input_ids=ids[:, :76], use_cache=True)
        out = model(input_ids=ids[:, 76:77], past_key_values=out.past_key_values, use_cache=True)
        cache = pickle.loads(pickle.dumps(out.past_key_values))
        assert cache.get_seq_length() == 77
        for i in range(77, 80):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    assert close(out.logits[:, -1].float(), recomputed(model, ids))


def test_a_mask_for_each_kind_of_layer(model: Any) -> None:
    ids = prompt(1, 10)
    with torch.no_grad():
        out = model(input_ids=ids[:, :9], use_cache=True)
        mask = {"full_attention": None, "sliding_attention": None}
        if "gemma" in model.config.model_type:
            model(input_ids=ids[:, 9:], past_key_values=out.past_key_values, attention_mask=mask)
        else:
            assert decoder._first(mask, 1, 10) is None  # type: ignore[arg-type]
