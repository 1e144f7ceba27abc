"""A model run block by block gives what the loaded one gives, bit for bit, in the memory of one block."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from models import FAMILIES, FUSED, TINY, make_model

from qkit.calibrate import states as kept_states
from qkit.errors import QkitError
from qkit.measure import memory, states
from qkit.measure.streamed import Streamed
from qkit.runtime import load
from qkit.runtime.frame import Frame
from qkit.sources import open_source

# What makes one architecture's forward differ from another's around its blocks.
OTHERS = {
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 32, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "smollm3": {"pad_token_id": 0},
    "starcoder2": {},
}
CASES = {
    **{name: (name, {}) for name in (*FAMILIES, *FUSED)},
    **{name: (name, changes) for name, changes in OTHERS.items()},
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3 sliding": (
        "qwen3",
        {
            "sliding_window": 16,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
    ),
}


def build(folder, case):
    from models import make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    family, changes = CASES[case]
    if family in FAMILIES or family in FUSED:
        return str(make_model(folder, family, **changes))
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**TINY, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return str(folder)


def tokens_of(chunks=3, n_ctx=40):
    return torch.randint(0, 250, (chunks, n_ctx), generator=torch.Generator().manual_seed(1))


def own(model, tokens):
    with torch.inference_mode():
        return [model(input_ids=chunk[None], use_cache=False).logits[0] for chunk in tokens]


@pytest.mark.parametrize("case", list(CASES))
def test_logits_are_those_of_the_loaded_model(case, tmp_path):
    folder = build(tmp_path / "model", case)
    tokens, model = tokens_of(), load(folder, device="cpu")
    want = own(model, tokens)
    assert want[0].float().std() > 1e-3
    streamed = Streamed(Frame(open_source(folder), "cpu")).run(tokens)
    for _ in range(2):  # of a baseline they are made again for each model
        got = list(streamed.logits())
        assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert streamed.weights == memory.weights(model)
    assert all(p.is_meta for p in streamed.frame.model.parameters())
    kept = states.of_loaded(model, tokens)
    assert all(torch.equal(a, b) for a, b in zip(states.logits(model, kept, model.device), want, strict=True))
    afterwards = Streamed(Frame(open_source(folder), "cpu"), kept)
    assert all(torch.equal(a, b) for a, b in zip(afterwards.logits(), want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own(model, tokens), want, strict=True))  # left as it was


def test_many_states_are_kept_in_a_file(llama, monkeypatch):
    tokens, folder = tokens_of(), str(llama)
    inside = list(Streamed(Frame(open_source(folder), "cpu")).run(tokens).logits())
    monkeypatch.setattr(kept_states, "IN_MEMORY", 0)
    streamed = Streamed(Frame(open_source(folder), "cpu")).run(tokens)
    assert all(torch.equal(a, b) for a, b in zip(streamed.logits(), inside, strict=True))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room on disk is taken at once on POSIX")
def test_a_full_disk_is_an_error_before_anything_is_written(monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept_states, "IN_MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(QkitError, match=r"3\.1 kB of hidden states have no room in .*: No space left") as caught:
        kept_states.States(3).append(torch.zeros(1, 4, 64, dtype=torch.float32))
    assert "TMPDIR" in caught.value.hint


CACHE = {"kv_cache": "fp8", "calib_samples": 2, "calib_len": 64}


@pytest.mark.parametrize("options", [
    {"format": "compressed-tensors"}, {"format": "gptq"}, {"format": "awq"}, {"format": "bnb"}, {"format": "gguf"},
    {"format": "compressed-tensors", "scheme": "w8a16", "head": "8bit", **CACHE},
], ids=str)  # fmt: skip
def test_quantized_checkpoints(options, llama, tmp_path):
    from qkit.conversion.run import convert

    out = str(tmp_path / "out")
    convert(str(llama), out, method="rtn", **options)
    tokens, model = tokens_of(), load(out, device="cpu")
    want = own(model, tokens)
    streamed = Streamed(Frame(open_source(out), "cpu")).run(tokens)
    assert all(torch.equal(a, b) for a, b in zip(streamed.logits(), want, strict=True))
    assert streamed.weights == memory.weights(model)


SCRIPT = """
import json, sys
import torch, transformers
from qkit.hardware import memory as process
from qkit.measure import footprint, profile, speed
footprint.apart = lambda *given: "not looked at"
speed.GENERATED, speed.REPEATS, speed._CEILING_BYTES = 4, 1, 1 << 20
torch.set_num_threads(1)
before = process.resident()
most = before + int(sys.argv[2]) if int(sys.argv[2]) else None
result = profile(sys.argv[1], device="cpu", out=sys.argv[3], chunks=2, context=16, max_memory=most)
scores = result.models[0].quality["full"].perplexity
print(json.dumps([most, before, process.peak_resident(), result.models[0].loaded, scores.value]))
"""


def test_max_memory_is_kept(tmp_path):
    """In processes of their own: a model of ten blocks that fits, and one that does not."""
    folder = make_model(
        tmp_path / "model", hidden_size=768, intermediate_size=2560, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=12, head_dim=64, max_position_embeddings=128,
    )  # fmt: skip
    weights = open_source(str(folder)).stored.nbytes
    found = []
    for most in (0, 350 << 20):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder), str(most), str(tmp_path / "r")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    (_, before, peak, loaded, figure), (most, own, least, whole, same) = found
    assert loaded and not whole and figure == same
    assert least <= most and peak - before > weights
    assert (peak - before) - (least - own) > weights / 2
