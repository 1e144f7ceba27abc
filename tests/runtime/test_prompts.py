"""Prompts in C++: as if the model's own forward had run, logits and cache, in pieces, behind others, with padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from caches import IN_PLACE, KINDS, WINDOW, close, described, recomputed, text
from models import make_model
from steps import error, own, packed, steps_taken
from transformers import DynamicCache

from qkit.kernels import backend
from qkit.kernels.cpu import decoder as pieces
from qkit.models.cache_name import cache_name
from qkit.runtime import load

pytestmark = pytest.mark.skipif(backend().startswith("torch"), reason="needs the C++ library")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / request.param, **KINDS[request.param])


@pytest.fixture
def model(folder: Path) -> Any:
    return packed(folder)


@pytest.fixture
def taken(monkeypatch: Any) -> list[bool]:
    return steps_taken(monkeypatch)


@torch.no_grad()
def asked(model: Any, ids: torch.Tensor, cache: Any = None, **given: Any) -> tuple[torch.Tensor, Any]:
    """The logits behind `ids`, as `generate` asks for them, and the cache."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_name(): cache}, **given)
    assert out.logits.shape[1] == 1
    return out.logits[:, -1].float(), out[cache_name()]


def fed(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    for column in ids.split(1, 1):
        logits, _ = asked(model, column, cache)
    return logits


@pytest.mark.parametrize("length", [2, WINDOW - 1, WINDOW, 3 * WINDOW, 245, 500])
def test_as_the_models_own_forward(folder: Path, model: Any, length: int, taken: list[bool]) -> None:
    """Closer to float32 than it, or as close; and the cache says of itself what it would say."""
    ids = text(1, length)
    exact, plain = packed(folder, torch.float32), packed(folder)
    with torch.no_grad():
        truth = own(exact)(input_ids=ids, use_cache=True)
        theirs = own(plain)(input_ids=ids, use_cache=True)
    logits, cache = asked(model, ids)
    wanted = truth.logits[:, -1].float()
    assert taken == [True]
    assert error(logits, wanted) <= 1.2 * error(theirs.logits[:, -1].float(), wanted) + 1e-3
    assert described(cache) == described(theirs.past_key_values)
    for a, b, c in zip(cache, theirs.past_key_values, truth.past_key_values, strict=True):
        for ours, near, right in zip(a[:2], b[:2], c[:2], strict=True):
            assert error(ours.float(), right) <= 1.2 * error(near.float(), right) + 1e-3


@pytest.mark.parametrize("piece", [7, 12, pieces.PROMPT])
def test_turns_of_a_conversation(model: Any, piece: int, taken: list[bool], monkeypatch: Any) -> None:
    """Prompts behind prompts and steps, by pieces that end anywhere in a window and beyond it."""
    monkeypatch.setattr(pieces, "PROMPT", piece)
    ids, cache, at = text(1, 330), None, 0
    for turn in (1, 5, 2, 1, WINDOW, 1, 40, 1, 263):
        logits, cache = asked(model, ids[:, at : at + turn], cache)
        at += turn
        assert cache.get_seq_length() == at
        assert close(logits, recomputed(model, ids[:, :at]))
    assert taken == [step for _ in range(9) for step in (True, False)]


@pytest.mark.parametrize("piece", [16, pieces.PROMPT])
def test_padding_on_the_left(model: Any, piece: int, taken: list[bool], monkeypatch: Any) -> None:
    """Each sequence as if it were alone; more padding than a piece; and what is padded is a number in the cache."""
    monkeypatch.setattr(pieces, "PROMPT", piece)
    ids, pads = text(3, 60), (0, 9, 41)
    mask = torch.ones_like(ids)
    for row, pad in zip(mask, pads, strict=True):
        row[:pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, cache = asked(model, ids[:, :-2], attention_mask=mask[:, :-2], position_ids=positions[:, :-2])
    for at in (58, 59):
        given = {"attention_mask": mask[:, : at + 1], "position_ids": positions[:, at : at + 1]}
        logits, _ = asked(model, ids[:, at : at + 1], cache, **given)
    assert taken == [True] * 3
    assert all(torch.isfinite(t).all() for keys, values, _ in cache for t in (keys, values))
    for row, pad, found in zip(ids, pads, logits, strict=True):
        assert close(found[None], recomputed(model, row[None, pad:]))


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, 3 * WINDOW])
@pytest.mark.parametrize("call", IN_PLACE)
def test_methods_of_the_cache_behind_a_prompt(model: Any, call: str, length: int, taken: list[bool]) -> None:
    ids = text(2, max(length, 32) + 3)  # of several prompts, shorter ones are the model's own
    _, cache = asked(model, ids[:, :-3])
    method, rows = IN_PLACE[call]
    method(cache)
    ids = ids[rows]
    assert close(fed(model, ids[:, -3:], cache), recomputed(model, ids))
    assert taken == [True] * 4 + [False]


def test_a_cache_that_was_reset_or_made_for_it(model: Any, taken: list[bool]) -> None:
    cache = DynamicCache(config=model.config)
    for seed in (0, 1):
        ids = text(1, 50, seed)
        logits, same = asked(model, ids, cache)
        assert same is cache and close(logits, recomputed(model, ids))
        cache.reset()
        assert cache.get_seq_length() == 0
    assert taken == [True, False] * 2


def test_buffers_take_what_is_there_and_a_window(model: Any) -> None:
    _, cache = asked(model, text(1, 700))
    for layer, keys in zip(cache.layers, cache.layers[0].__dict__["_store"].keys, strict=True):
        assert keys.shape[2] <= (WINDOW - 1 + 256 if layer.is_sliding else 700 + 256)


def test_what_is_left_to_the_model(model: Any, taken: list[bool]) -> None:
    ids = text(1, 20)
    several = text(3, 20)
    hole = torch.ones_like(ids)
    hole[0, 5] = 0
    with torch.no_grad():
        assert model(input_ids=ids, use_cache=True).logits.shape[1] == 20
        assert model(input_ids=ids, use_cache=True, logits_to_keep=2).logits.shape[1] == 2
        assert model(input_ids=ids, use_cache=True, logits_to_keep=torch.tensor([3])).logits.shape[1] == 1
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        model(input_ids=ids, use_cache=True, logits_to_keep=1, attention_mask=hole)
        model(input_ids=several, use_cache=True, logits_to_keep=1)
        hook = model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        hook.remove()
        assert not any(taken)
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        assert taken[-1]


def test_linears_that_are_not_packed_are_left_to_the_model(folder: Path, taken: list[bool]) -> None:
    model = load(folder, device="cpu")
    _, cache = asked(model, text(1, 20))
    asked(model, text(1, 1), cache)
    assert taken == [False, True]
