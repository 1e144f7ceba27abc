"""--kv-cache fp8: scales of keys and values as tensors of the result; and sources that have them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, make_model
from results import QUICK, contents
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import qkit
from qkit.calibrate import observe
from qkit.conversion.kv_cache import CacheScales
from qkit.conversion.render import describe
from qkit.conversion.workspace import partial_dir
from qkit.errors import QkitError
from qkit.inspection import describe as described
from qkit.inspection import inspect
from qkit.measure.quality import compare, model_logits
from qkit.runtime import decoder, load_tokenizer
from qkit.sources import open_source
from qkit.storage.manifest import Manifest
from qkit.text.windows import calibration_tokens

FP8 = {"kv_cache": "fp8", **QUICK}
NAMES = [f"model.layers.{i}.self_attn.{local}" for i in range(2) for local in ("k_scale", "v_scale")]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def scheme_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]


@pytest.fixture(scope="module")
def rounded(llama, tmp_path_factory):
    """The tiny Llama at 8 bits with an FP8 cache."""
    out = tmp_path_factory.mktemp("kv") / "out"
    qkit.convert(llama, out, scheme="w8a16", method="rtn", **FP8)
    return out


class Recording(DynamicCache):
    def update(self, keys, values, layer, *args, **kwargs):
        seen = self.__dict__.setdefault("seen", {})
        for local, x in (("k_scale", keys), ("v_scale", values)):
            name = f"model.layers.{layer}.self_attn.{local}"
            seen[name] = max(seen.get(name, 0.0), float(x.abs().max()))
        return super().update(keys, values, layer, *args, **kwargs)


def naive(folder: Path, tokens: torch.Tensor) -> dict[str, float]:
    """The largest keys and values that transformers' own model gives its cache, whole model, window by window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found: dict[str, float] = {}
    for row in tokens:
        cache = Recording(config=model.config)
        with torch.no_grad():
            model(row[None], past_key_values=cache)
        found = {name: max(found.get(name, 0.0), value) for name, value in cache.seen.items()}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_observed_is_what_the_cache_of_the_whole_model_gets(family, tmp_path):
    folder = make_model(tmp_path / "m", family)
    tokens = torch.randint(0, 256, (3, 80), generator=torch.Generator().manual_seed(2))
    found = observe.observe_cache(open_source(str(folder)), tokens)
    expected = naive(folder, tokens)
    assert list(found) == NAMES and found.keys() == expected.keys()
    for name, value in found.items():  # batches of another size round sums otherwise
        assert value == pytest.approx(expected[name], rel=2**-7), name


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_scales_are_the_largest_over_448_and_said_everywhere(llama, tmp_path, method):
    result = qkit.convert(llama, tmp_path / "out", method=method, **FP8)
    tokenizer = load_tokenizer(llama)
    tokens = calibration_tokens(None, tokenizer, FP8["calib_samples"], FP8["calib_len"]).tokens
    expected, found = naive(llama, tokens), tensors(result.out)
    manifest = Manifest.load(result.out)
    for name in NAMES:
        largest = manifest.tensors[name]["largest"]
        assert largest == pytest.approx(expected[name], rel=2**-7)
        assert torch.equal(found[name], torch.tensor([largest / 448], dtype=torch.bfloat16))
        assert manifest.tensors[name]["computed_on"] and manifest.tensors[name]["calibration_tokens"] == 128
    scheme = scheme_of(result.out)
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert wanted.items() <= scheme.items()
    assert manifest.identity["kv_cache"] == "fp8" and manifest.identity["calibration"]["samples"] == 4
    index = json.loads((result.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(NAMES) <= index.keys()
    card = (result.out / "README.md").read_text()
    assert "KV cache: FP8 (e4m3), half the bytes" in card and "Calibrated on 4 x 32 tokens" in card
    assert "| quantized layers | 14 |" in card
    assert inspect(str(result.out), verify=True).problems == []
    # The weights are those without it.
    qkit.convert(llama, tmp_path / "plain", method=method, **QUICK)
    plain = tensors(tmp_path / "plain")
    assert found.keys() - plain.keys() == set(NAMES)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert scheme_of(tmp_path / "plain") is None


def test_a_plan_says_it(llama, tmp_path):
    plan = qkit.convert(llama, tmp_path / "out", method="rtn", dry_run=True, **FP8).plan
    text = describe(plan)
    assert "KV cache fp8 (e4m3), 8 bits a value for 16: half the bytes; scales calibrated" in text
    assert "4 tensors  kept: KV cache scale" in text
    told = plan.as_dict()
    assert told["kv_cache"] == {"kind": "fp8", "calibrated": True, "bits": 8}
    assert [t["name"] for t in told["tensors"] if t["kept"] == "KV cache scale"] == NAMES
    without = qkit.convert(llama, tmp_path / "out", method="rtn", kv_cache="keep", dry_run=True).plan
    assert without.as_dict()["kv_cache"] is None and "KV cache" not in describe(without)
    assert plan.predicted.seconds > without.predicted.seconds and plan.predicted.peak > without.predicted.peak
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"format": "gptq"}, "format gptq cannot say", "compressed-tensors"),
        ({"format": "gguf"}, "format gguf cannot say", "compressed-tensors"),
        ({"format": "safetensors", "scheme": "none"}, "format safetensors cannot say", "compressed-tensors"),
        ({"kv_cache": "int8"}, "'int8' is not a way", "keep or fp8"),
        ({"method": "rtn", "calib": "/nowhere.txt"}, "nowhere", None),
        ({"method": "rtn", "calib_len": 4096}, "longer than the 512 tokens", "512"),
    ],
)
def test_refusals_before_work(llama, tmp_path, changes, message, hint):
    with pytest.raises(QkitError, match=message) as caught:
        qkit.convert(llama, tmp_path / "out", dry_run=True, **{"kv_cache": "fp8", **changes})
    assert hint is None or hint in caught.value.hint


def test_an_architecture_that_cannot_be_run(llama, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "frobnicator"}))
    with pytest.raises(QkitError, match="'frobnicator' is not supported") as caught:
        qkit.convert(source, tmp_path / "out", method="rtn", dry_run=True, **FP8)
    assert "leave --kv-cache out" in caught.value.hint and "llama" in caught.value.hint
    qkit.convert(source, tmp_path / "out", method="rtn", dry_run=True)


@pytest.mark.parametrize(("largest", "dtype"), [(0.0, "bfloat16"), (1e-9, "float16")])
def test_a_scale_is_never_zero(llama, tmp_path, largest, dtype):
    source = open_source(str(llama))
    source.config = {**source.config, "dtype": dtype}
    view = CacheScales(source, ["model.layers.0.self_attn"])
    view.largest = dict.fromkeys(view.scales, largest)
    scale = view.read(view.scales[0])
    assert scale.dtype == getattr(torch, dtype) and float(scale) > 0
    assert largest or float(scale) == 1.0


def test_nan_on_the_calibration_text_is_refused(tmp_path):
    source = make_model(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"].fill_(3e38)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(QkitError, match=r"NaN or inf"):
        qkit.convert(source, tmp_path / "out", method="rtn", scheme="w8a16", **FP8)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_interruption_anywhere_gives_the_same_bytes_and_observes_once(llama, tmp_path, monkeypatch, method):
    options = {"method": method, **FP8}
    qkit.convert(llama, tmp_path / "whole" / "out", **options)
    expected = contents(tmp_path / "whole" / "out")
    real = {name: getattr(os, name) for name in ("replace", "rename", "fsync")}
    passes: list[int] = []
    observed = observe.observe_cache
    monkeypatch.setattr(observe, "observe_cache", lambda *a, **k: passes.append(1) or observed(*a, **k))
    left = 0

    def counted(name):
        def step(*args):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return real[name](*args)

        return step

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    for moment in random.Random(3).sample(range(1, 40), 10):
        out = tmp_path / f"cut{moment}" / "out"
        passes.clear()
        left = moment
        try:
            qkit.convert(llama, out, **options)
        except KeyboardInterrupt:
            left = 0
            manifest = Manifest.find(partial_dir(out)) if partial_dir(out).is_dir() else None
            kept = manifest is not None and NAMES[0] in manifest.tensors
            passes.clear()
            if not out.exists():
                qkit.convert(llama, out, **options)
                assert len(passes) == (0 if kept else 1)
        left = 0
        assert contents(out) == expected, moment


RUN = "import sys\nfrom qkit.cli import main\nsys.exit(main(sys.argv[1:]))"


def test_killed_and_resumed_gives_the_same_bytes(llama, tmp_path):
    words = ["--method", "gptq", "--kv-cache", "fp8", "--calib-samples", "4", "--calib-len", "32"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", RUN, "convert", str(llama), "-o", str(out), *words]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    out = tmp_path / "cut"
    run = start(out)
    while run.poll() is None and not list(partial_dir(out).glob("model-*.safetensors")):
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not out.exists()
    assert NAMES[0] in Manifest.load(partial_dir(out)).tensors
    assert start(out).wait() == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_loaded_with_a_rounded_cache_and_without_the_fast_step(rounded, llama, tmp_path):
    qkit.convert(llama, tmp_path / "plain", scheme="w8a16", method="rtn")
    model, plain = (qkit.load(folder, device="cpu") for folder in (rounded, tmp_path / "plain"))
    stored = tensors(rounded)
    assert all(torch.equal(model.state_dict()[name], stored[name]) for name in NAMES)
    assert "rounded on their way into the KV cache" in (decoder.attach(model) or "")
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        a, b = model(ids).logits.float(), plain(ids).logits.float()
        assert 1e-4 < float((a - b).norm() / b.norm()) < 0.1
        out = model(ids[:, :-1], use_cache=True)
        stepped = model(ids[:, -1:], past_key_values=out.past_key_values).logits[:, -1].float()
        assert float((stepped - a[:, -1]).norm() / a[:, -1].norm()) < 0.02
        scale = stored[NAMES[0]].float()
        codes = out.past_key_values.layers[0].keys.float() / scale
    assert float((codes - codes.to(torch.float8_e4m3fn).float()).abs().max()) < 2**-7 * 448
    assert torch.equal(
        model.generate(ids[:1], max_new_tokens=3, do_sample=False), model.generate(ids[:1], max_new_tokens=3)
    )


def test_inspect_says_it(rounded):
    found = inspect(str(rounded))
    assert found.kv_cache == "fp8" and "KV cache      fp8" in described(found)
    assert found.as_dict()["kv_cache"] == "fp8"
    assert found.parameters == sum(m.numel() for m in AutoModelForCausalLM.from_config(_plain(rounded)).parameters())


def _plain(folder: Path) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return config


def test_quality_measures_what_it_costs(rounded, llama, tmp_path):
    """With weights that lose next to nothing, most of what is lost is the cache's."""
    qkit.convert(llama, tmp_path / "plain", scheme="w8a16", method="rtn")
    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(6))
    base, with_cache, without = (
        list(model_logits(qkit.load(f, device="cpu", dtype="float32"), tokens))
        for f in (llama, rounded, tmp_path / "plain")
    )
    lost, of_weights = (
        compare(base, model, tokens).protocols["full"].against.kld.value for model in (with_cache, without)
    )
    assert lost > 3 * of_weights > 0


def edited(folder: Path, out: Path, drop: tuple[str, ...] = (), **scheme: Any) -> Path:
    """A copy in one file, without some tensors, whose kv_cache_scheme says something else."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json" and not file.name.endswith("index.json"):
            shutil.copy(file, out)
    save_file({k: v for k, v in tensors(folder).items() if k not in drop}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] |= scheme
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    "scheme", [{"type": "int"}, {"num_bits": 4}, {"strategy": "attn_head"}, {"dynamic": True}, {"symmetric": False}]
)
def test_schemes_that_are_not_read(rounded, tmp_path, scheme):
    folder = edited(rounded, tmp_path / "other", **scheme)
    for use in (lambda: qkit.load(folder), lambda: inspect(str(folder)), lambda: qkit.convert(folder, tmp_path / "o")):
        with pytest.raises(QkitError, match="quantized KV cache with") as caught:
            use()
        assert "8-bit floats" in caught.value.hint


def test_a_scale_that_is_missing(rounded, tmp_path):
    with pytest.raises(QkitError, match=r"lacks model\.layers\.1\.self_attn\.k_scale"):
        qkit.load(edited(rounded, tmp_path / "other", drop=(NAMES[2],)))


def test_a_folder_of_which_only_the_cache_is_quantized(rounded, llama, tmp_path):
    """As llm-compressor writes it: no config groups."""
    folder = tmp_path / "only"
    shutil.copytree(llama, folder)
    scales = {name: tensors(rounded)[name] for name in NAMES}
    save_file({**tensors(llama), **scales}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
    config["quantization_config"] = {**quantization, "kv_cache_scheme": scheme_of(rounded)}
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert not torch.equal(*(qkit.load(f, device="cpu")(ids).logits for f in (folder, llama)))
    out = qkit.convert(folder, tmp_path / "out", scheme="w8a16", method="rtn").out
    assert scheme_of(out) and set(NAMES) <= tensors(out).keys()


@pytest.mark.parametrize("head", [None, "8bit"])
def test_a_source_with_scales_keeps_them_in_the_same_format(rounded, tmp_path, head):
    result = qkit.convert(rounded, tmp_path / "out", head=head)
    before, after = tensors(rounded), tensors(result.out)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("lm_head"))
    assert scheme_of(result.out) == scheme_of(rounded)
    assert "scales as in the source" in describe(result.plan)
    manifest = Manifest.load(result.out)
    assert manifest.identity["kv_cache"] == "as stored" and manifest.identity["calibration"] is None
    repacked = {entry["method"] for name, entry in manifest.tensors.items() if not name.startswith("lm_head")}
    assert repacked == {"repacked"}


def test_a_source_with_scales_calibrated_anew(rounded, tmp_path):
    result = qkit.convert(rounded, tmp_path / "out", method="rtn", kv_cache="fp8", calib_samples=2, calib_len=16)
    assert any("calibrated anew" in note for note in result.plan.notes)
    before, after = tensors(rounded), tensors(result.out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name not in NAMES)
    assert any(not torch.equal(before[name], after[name]) for name in NAMES)


@pytest.mark.parametrize("options", [{"format": "gptq"}, {"format": "safetensors", "scheme": "none"}])
def test_a_source_with_scales_drops_them_elsewhere(rounded, tmp_path, options):
    result = qkit.convert(rounded, tmp_path / "out", **options)
    assert any("stays at 16 bits" in note for note in result.plan.notes)
    assert not set(NAMES) & tensors(result.out).keys()
    qkit.load(result.out, device="cpu")
