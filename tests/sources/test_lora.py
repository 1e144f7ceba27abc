"""Merging adapters: PEFT's own merge is the oracle, and what cannot be merged is refused when it is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkit.errors import QkitError
from qkit.sources import open_source
from qkit.sources.folder import FolderSource
from qkit.sources.lora import CONFIG, WEIGHTS, LoraSource, merge

peft = pytest.importorskip("peft")
LLAMA = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**(GPT2 if family == "gpt2" else LLAMA), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("lora") / "base")


def make_adapter(base: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Save a random adapter for `base` in `folder`; returns the weights as PEFT merges them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    defaults = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", "target_modules": ATTENTION}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **options}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload().state_dict()


ORACLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linears": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "k_proj": 3, "proj": 5},
        "alpha_pattern": {r"^model\.layers\.0\..*": 7, "v_proj": 2.5},
    },
    "pattern order": {"rank_pattern": {".*proj": 2, "q_proj": 9}, "use_rslora": True},
    "modules to save": {"modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lm head": {"target_modules": ["v_proj", "lm_head"]},
    "all biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "dora": {"use_dora": True},
    "dora embedding": {"use_dora": True, "target_modules": ["embed_tokens", "down_proj"]},
    "some layers": {"layers_to_transform": [1]},
}


def assert_merged(source: LoraSource, expected: dict[str, torch.Tensor], base: Path) -> None:
    before, changed = FolderSource(base), 0
    for name in source.names():
        found = source.read(name)
        assert found.dtype == expected[name].dtype and found.is_contiguous()
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=1e-6)
        changed += not torch.equal(found, before.read(name))
    assert changed


@pytest.mark.parametrize("case", ORACLE)
def test_equals_peft(base: Path, tmp_path: Path, case: str) -> None:
    expected = make_adapter(base, tmp_path / "a", **ORACLE[case])
    assert_merged(LoraSource(FolderSource(base), tmp_path / "a"), expected, base)


@pytest.mark.parametrize("dora", [False, True])
def test_conv1d(tmp_path: Path, dora: bool) -> None:
    base = make_base(tmp_path / "gpt2", "gpt2", tie_word_embeddings=False)
    options = {"target_modules": ["c_attn", "c_proj", "lm_head"], "fan_in_fan_out": True, "use_dora": dora}
    expected = make_adapter(base, tmp_path / "a", **options)
    assert not json.loads((tmp_path / "a" / CONFIG).read_text())["fan_in_fan_out"]  # PEFT's flag misleads here
    assert_merged(LoraSource(FolderSource(base), tmp_path / "a"), expected, base)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_rounded_once(tmp_path: Path, adapter_dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    make_adapter(base, tmp_path / "a")
    weights = {n: t.to(adapter_dtype) for n, t in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(weights, tmp_path / "a" / WEIGHTS)
    source, plain = LoraSource(FolderSource(base), tmp_path / "a"), FolderSource(base)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"):
        a, b = (weights[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        exact = plain.read(f"{module}.weight").double() + 3 * b @ a
        found = source.read(f"{module}.weight")
        assert found.dtype == torch.bfloat16
        # Half a unit in the last place, with room for the float32 sum.
        spacing = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - 7)
        assert bool(((found.double() - exact).abs() <= 0.501 * spacing + 1e-7).all())


def test_blocks_of_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkit.sources import lora

    torch.manual_seed(0)
    for transposed in (False, True):
        for dora in (False, True):
            weight = torch.randn(37, 19)
            a, b = torch.randn(5, 37 if transposed else 19), torch.randn(19 if transposed else 37, 5)
            magnitude = torch.rand(b.shape[0]) if dora else None
            results = []
            for rows in (1 << 20, 4, 1):
                monkeypatch.setattr(lora, "ROWS", rows)
                results.append(merge(weight.clone(), a, b, 0.5, transposed, magnitude, torch.float32))
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


def test_names_with_and_without_the_models_prefix(base: Path, tmp_path: Path) -> None:
    expected = make_adapter(base, tmp_path / "a")
    bare = tmp_path / "bare"
    bare.mkdir()
    weights = load_file(base / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in weights.items()}, bare / "model.safetensors")
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    source = LoraSource(FolderSource(bare), tmp_path / "a")
    name = "model.layers.1.self_attn.v_proj.weight"  # as loaders look for it
    torch.testing.assert_close(source.read(name), expected[name], atol=1e-6, rtol=1e-6)


def test_what_the_source_says(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "a")
    plain = FolderSource(base)
    source = open_source(str(base), lora=str(tmp_path / "a"))
    assert source.names() == plain.names() and source.config == plain.config and source.sidecars == plain.sidecars
    assert source.base_model == plain.base_model and source.fingerprint != plain.fingerprint
    weights = {n: t + 1 for n, t in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(weights, tmp_path / "a" / WEIGHTS)
    assert LoraSource(plain, tmp_path / "a").fingerprint != source.fingerprint


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return edit


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another method": (edit_config(peft_type="IA3"), "LORA only"),
    "an option": (edit_config(use_qalora=True), "use_qalora"),
    "expert parameters": (edit_config(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters"),
    "changed base": (edit_config(init_lora_weights="pissa"), "had changed"),
    "no rank": (edit_config(r=None), "positive whole number"),
    "rank in pattern": (edit_config(rank_pattern={"q_proj": 0}), "positive whole number"),
    "alpha": (edit_config(lora_alpha="8"), "not a number"),
    "bad pattern": (edit_config(rank_pattern={"(": 4}), "invalid pattern"),
    "endless alpha": (edit_config(lora_alpha=10**400), "not a number"),
    "NaN": (edit_config(alpha_pattern={"q_proj": float("nan")}), "not a number"),
    "pattern list": (edit_config(alpha_pattern=[1]), "not a table"),
    "other rank": (edit_config(r=8), "says rank 8"),
    "dora without magnitude": (edit_config(use_dora=True), "contradict"),
    "no B": (edit_weights(lambda w: w.pop(f"{Q}.lora_B.weight")), "only one of"),
    "wrong shape": (edit_weights(lambda w: w.update({f"{Q}.lora_B.weight": torch.ones(63, 4)})), "does not fit"),
    "integers": (edit_weights(lambda w: w.update({f"{Q}.lora_B.weight": torch.ones(64, 4).int()})), "not as floats"),
    "absent target": (
        edit_weights(lambda w: w.update({f"{Q}s.lora_{x}.weight": torch.ones(4, 4) for x in "AB"})),
        "does not have",
    ),
    "unknown part": (edit_weights(lambda w: w.update({f"{Q}.lora_E.weight": torch.ones(4)})), "kind"),
    "copy of another shape": (
        edit_weights(lambda w: w.update({"base_model.model.lm_head.weight": torch.ones(97, 64)})), "is \\[97, 64\\]",
    ),
    "bias for a layer without": (
        edit_weights(lambda w: w.update({"base_model.model.lm_head.lora_B.bias": torch.ones(96)})), "does not have",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "cannot read"),
    "pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin") and None, "pickle"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config"),
    "broken config": (lambda folder: (folder / CONFIG).write_text("{") and None, "not valid JSON"),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    make_adapter(base, folder)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_work(base: Path, adapter: Path, tmp_path: Path, case: str) -> None:
    import shutil

    edit, message = REFUSED[case]
    shutil.copytree(adapter, tmp_path / "a")
    edit(tmp_path / "a")
    with pytest.raises(QkitError, match=message):
        LoraSource(FolderSource(base), tmp_path / "a")


def test_a_pattern_made_to_stall_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr("qkit.untrusted.PATTERN_SECONDS", 0.1)
    shutil.copytree(adapter, tmp_path / "a")
    edit_config(rank_pattern={"((.|.)+)+[^a-z0-9_.]": 4})(tmp_path / "a")
    with pytest.raises(QkitError, match="takes more than"):
        LoraSource(FolderSource(base), tmp_path / "a")


def test_refused_places(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(QkitError, match="no adapter folder"):
        LoraSource(FolderSource(base), tmp_path / "absent")
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    weights = {n: t.to(torch.uint8) for n, t in load_file(base / "model.safetensors").items()}
    save_file(weights, quantized / "model.safetensors")
    (quantized / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(QkitError, match="float weights only"):
        LoraSource(FolderSource(quantized), adapter)


def test_tied_embeddings(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    make_adapter(base, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / WEIGHTS)
    settings = json.loads((tmp_path / "plain" / CONFIG).read_text())

    def opened(changes: dict[str, torch.Tensor], **options: Any) -> LoraSource:
        folder = tmp_path / "a"
        folder.mkdir(exist_ok=True)
        (folder / CONFIG).write_text(json.dumps({**settings, **options}))
        save_file({**plain, **{f"base_model.model.{n}": t.clone() for n, t in changes.items()}}, folder / WEIGHTS)
        return LoraSource(FolderSource(base), folder)

    e, h, new = "model.embed_tokens", "lm_head", torch.randn_like(embedding)
    low_rank = {f"{e}.lora_embedding_A": torch.randn(4, 96), f"{e}.lora_embedding_B": torch.randn(64, 4)}
    # Copies that agree, with each other or with the base, are the tied weight.
    assert torch.equal(opened({f"{e}.weight": embedding}).read(f"{e}.weight"), embedding)
    assert torch.equal(opened({f"{h}.weight": embedding}).read(f"{e}.weight"), embedding)
    assert torch.equal(opened({f"{e}.weight": new, f"{h}.weight": new}).read(f"{e}.weight"), new)
    # Trained as one tensor.
    assert torch.equal(opened({f"{e}.weight": new}, ensure_weight_tying=True).read(f"{e}.weight"), new)
    assert not torch.equal(opened(low_rank, ensure_weight_tying=True).read(f"{e}.weight"), embedding)
    for changes in (
        {f"{e}.weight": new},
        {f"{h}.weight": new},
        {f"{e}.weight": new, f"{h}.weight": new + 1},
        low_rank,
        {f"{h}.lora_A.weight": torch.randn(4, 64), f"{h}.lora_B.weight": torch.randn(96, 4)},
    ):
        with pytest.raises(QkitError, match="shares between input and output") as caught:
            opened(changes)
        assert "tie_word_embeddings = False" in (caught.value.hint or "")
