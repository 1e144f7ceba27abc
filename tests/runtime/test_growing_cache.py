"""Every method of transformers' cache between fast steps: as if the text had been computed from scratch."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import IN_PLACE, KINDS, WINDOW, close, described, recomputed, text
from models import make_model
from steps import steps_taken
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qkit.kernels import backend
from qkit.models.cache_name import cache_name
from qkit.runtime import decoder, growing_cache, load

pytestmark = pytest.mark.skipif(backend().startswith("torch"), reason="the fast step needs the C++ library")

LENGTHS = [8, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW]
MORE = 3


@pytest.fixture(scope="module", params=KINDS)
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / request.param, **KINDS[request.param])


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder, device="cpu")


@pytest.fixture
def taken(monkeypatch: Any) -> list[bool]:
    return steps_taken(monkeypatch)


@torch.no_grad()
def fed(model: Any, ids: torch.Tensor, cache: Any = None, at_once: int = 1) -> tuple[torch.Tensor, Any]:
    """The last logits, and the cache, which is the one given, after `ids`, so many at once."""
    for part in ids.split(at_once, 1):
        out = model(input_ids=part, use_cache=True, **{cache_name(): cache})
        cache = out[cache_name()]
    return out.logits[:, -1].float(), cache


def begun(model: Any, ids: torch.Tensor) -> Any:
    """A cache of `ids`, of which the last two were steps."""
    _, cache = fed(model, ids[:, :-2], at_once=1000)
    return fed(model, ids[:, -2:], cache)[1]


def saved(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def shallow(cache: Any) -> Any:
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "shallow": shallow,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": saved,
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("call", IN_PLACE)
def test_methods_in_place(model: Any, call: str, length: int, taken: list[bool]) -> None:
    ids = text(2, length + MORE)
    cache = begun(model, ids[:, :length])
    method, rows = IN_PLACE[call]
    assert method(cache) is None
    ids = ids[rows]
    logits, same = fed(model, ids[:, length:], cache)
    assert same is cache and cache.get_seq_length() == length + MORE
    assert close(logits, recomputed(model, ids))
    assert taken == [False, True, True, *MORE * [True], False]  # the cache came back to the step at once
    again, _ = fed(model, text(len(rows), 4, 1), cache, at_once=4)  # and goes on in the model's own forward
    assert close(again, recomputed(model, torch.cat([ids, text(len(rows), 4, 1)], 1)))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_and_its_original_go_separate_ways(model: Any, how: str, length: int, taken: list[bool]) -> None:
    ids, other = text(2, length + MORE), text(2, MORE, 1)
    cache = begun(model, ids[:, :length])
    copied = COPIES[how](cache)
    classes = {DynamicLayer, DynamicSlidingWindowLayer}
    assert {type(layer) for layer in copied.layers} <= classes and described(copied) == described(cache)
    one, _ = fed(model, other[:, :1], copied)
    logits, _ = fed(model, ids[:, length:], cache)
    another, _ = fed(model, other[:, 1:], copied)
    assert close(logits, recomputed(model, ids))
    assert close(one, recomputed(model, torch.cat([ids[:, :length], other[:, :1]], 1)))
    assert close(another, recomputed(model, torch.cat([ids[:, :length], other], 1)))
    assert sum(taken) == 2 + 2 * MORE


@pytest.mark.parametrize("length", LENGTHS)
def test_a_cache_says_what_transformers_own_says(model: Any, length: int) -> None:
    ids = text(2, length)
    cache = begun(model, ids)
    decoder.detach(model)
    plain = begun(model, ids)
    assert described(cache) == described(plain)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert isinstance(ours, type(theirs))
        assert close(ours.keys.float(), theirs.keys.float()) and close(ours.values.float(), theirs.values.float())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("recording", [False, True])
def test_crop(model: Any, length: int, recording: bool, taken: list[bool]) -> None:
    """As transformers has it: a window that is full can give back what was recorded, and nothing else."""
    ids = text(1, length + MORE)
    cache = begun(model, ids[:, : length - 2] if recording else ids[:, :length])
    if recording:  # somebody guesses two tokens, and is wrong
        cache.activate_past_recording()
        fed(model, text(1, 2, 5), cache, at_once=2)
    left = length - 2
    if any(cache.is_sliding) and length >= WINDOW and not recording:
        for layer in cache.layers:
            if layer.is_sliding:
                with pytest.raises(RuntimeError, match="crop"):
                    layer.crop(-2)
        left = length
    else:
        cache.crop(-2)
    assert {cache.get_seq_length(i) for i in range(len(cache))} == {left}
    before = len(taken)
    logits, _ = fed(model, ids[:, left:], cache)
    assert all(taken[1:3]) and all(taken[before:]) == (not recording or not any(cache.is_sliding))
    assert close(logits, recomputed(model, ids))


@pytest.mark.parametrize("length", LENGTHS)
def test_reset(model: Any, length: int, taken: list[bool]) -> None:
    cache = begun(model, text(2, length))
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    ids = text(2, length + MORE, 1)
    fed(model, ids[:, :length], cache, at_once=1000)
    logits, _ = fed(model, ids[:, length:], cache)
    assert close(logits, recomputed(model, ids)) and sum(taken) == 2 + MORE


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("made", ["of a config", "of nothing", "of tensors", "initialized early"])
def test_caches_however_they_are_made(model: Any, made: str, length: int, taken: list[bool]) -> None:
    ids, config = text(2, length + MORE), model.config
    cache = DynamicCache() if made == "of nothing" else DynamicCache(config=config)
    if made == "initialized early":
        cache.early_initialization(2, config.num_key_value_heads, config.head_dim, torch.bfloat16, torch.device("cpu"))
        assert cache.is_initialized and cache.get_seq_length() == 0
    fed(model, ids[:, : length - 2], cache, at_once=1000)
    fed(model, ids[:, length - 2 : length], cache)
    if made == "of tensors":
        if any(cache.is_sliding) and length >= WINDOW:
            pytest.skip("a cache made of the tensors of full windows does not know how long the text was")
        cache = DynamicCache([(keys, values) for keys, values, _ in cache], config=config)
    logits, _ = fed(model, ids[:, length:], cache)
    assert close(logits, recomputed(model, ids)) and sum(taken) == 2 + MORE


def test_layers_of_another_kind_are_left_to_the_model(model: Any, taken: list[bool]) -> None:
    class Louder(DynamicLayer):
        def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(keys, values * -3, *args, **kwargs)

    def louder() -> Any:
        cache = DynamicCache()
        cache.layers = [Louder() for _ in range(model.config.num_hidden_layers)]
        return cache

    ids = text(1, 10)
    logits, _ = fed(model, ids[:, 6:], fed(model, ids[:, :6], louder(), at_once=6)[1])
    assert not any(taken) and not close(logits, recomputed(model, ids))


@pytest.mark.parametrize("window", [WINDOW // 2, 2 * WINDOW])
def test_windows_of_another_model_are_left_to_the_model(model: Any, window: int, taken: list[bool]) -> None:
    def cache() -> Any:
        made = DynamicCache()
        made.layers = [DynamicSlidingWindowLayer(window) for _ in range(model.config.num_hidden_layers)]
        return made

    ids = text(1, 40)
    logits, _ = fed(model, ids[:, 20:], fed(model, ids[:, :20], cache(), at_once=20)[1])
    assert not any(taken)
    decoder.detach(model)
    expected, _ = fed(model, ids[:, 20:], fed(model, ids[:, :20], cache(), at_once=20)[1])
    assert torch.equal(logits, expected)


def test_a_window_takes_a_window_of_memory(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(growing_cache, "HEADROOM", 5)
    ids = text(2, 90)
    cache = begun(model, ids[:, :10])
    for at in range(10, 90, 20):
        _, cache = fed(model, ids[:, at : at + 20], cache)
        store = cache.layers[0].__dict__["_store"]
        for layer, keys in zip(cache.layers, store.keys, strict=True):
            assert keys.shape[2] <= (WINDOW - 1 + 5 if layer.is_sliding else max(2 * (at + 20), at + 25))
    assert close(fed(model, text(2, 1, 1), cache)[0], recomputed(model, torch.cat([ids, text(2, 1, 1)], 1)))


def test_what_somebody_holds_of_a_cache_stays(model: Any, monkeypatch: Any) -> None:
    """While entries are moved to the front, buffers are replaced, and slots beyond the view are written."""
    monkeypatch.setattr(growing_cache, "HEADROOM", 3)
    ids = text(1, 60)
    cache = begun(model, ids[:, :20])
    held = []
    for at in range(20, 60):
        held += [(keys, keys.clone(), values, values.clone()) for keys, values, _ in cache]
        fed(model, ids[:, at : at + 1], cache)
    assert all(torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in held)


def test_a_layer_that_somebody_holds_stays_the_caches(model: Any) -> None:
    ids = text(1, 20)
    _, cache = fed(model, ids[:, :10], at_once=10)
    layers = list(cache.layers)
    fed(model, ids[:, 10:], cache)
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True)) and layers[0].get_seq_length() == 20


def test_a_cache_is_freed_with_its_last_reference(model: Any) -> None:
    cache = begun(model, text(1, 20))
    buffer = weakref.ref(cache.layers[0].__dict__["_store"].keys[0])
    gc.disable()
    try:
        del cache
        assert buffer() is None
    finally:
        gc.enable()
