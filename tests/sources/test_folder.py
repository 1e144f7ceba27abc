"""Model folders: what is read, what travels along, and every way they come damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qkit.errors import QkitError
from qkit.sources.folder import INDEX, FolderSource
from qkit.storage.files import is_inside, is_plain_name, natural_key

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make_sharded(folder: Path, config: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Twelve layers in two shards, with an index and the usual company. Returns the tensors."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    tensors = {f"model.layers.{i}.w": torch.randn(4, 3) for i in range(12)}
    names = list(tensors)
    halves = (names[:6], names[6:])
    for shard, half in zip(SHARDS, halves, strict=True):
        save_file({n: tensors[n] for n in half}, folder / shard)
    weight_map = {n: shard for shard, half in zip(SHARDS, halves, strict=True) for n in half}
    write_index(folder, weight_map)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    return tensors


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_sharded(tmp_path: Path) -> None:
    tensors = make_sharded(tmp_path / "m")
    source = FolderSource(tmp_path / "m")
    assert source.names() == [f"model.layers.{i}.w" for i in range(12)]  # 2 before 10
    for name, expected in tensors.items():
        assert torch.equal(source.read(name), expected)
        assert source.meta(name).shape == (4, 3) and source.meta(name).dtype == "F32"
    assert source.config == {"model_type": "llama"}
    assert source.base_model == "llama model"  # never a name of the user's folder
    with pytest.raises(KeyError):
        source.meta("absent")


def test_real_save_pretrained(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = FolderSource(llama)
    state = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").state_dict()
    assert set(source.names()) <= set(state)
    for name in source.names():
        assert torch.equal(source.read(name), state[name])
    assert [s.name for s in source.sidecars] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_sidecars(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    make_sharded(folder)
    carried = [
        "LICENSE", "NOTICE.pdf", "USE_POLICY.md", "chat_template.jinja", "generation_config.json", "merges.txt",
        "modeling_x.py", "preprocessor_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
    ]  # fmt: skip
    left = [
        "README.md", ".gitattributes", ".cache.json", "pytorch_model.bin", "x.pt", "x.pth", "x.gguf", "x.onnx", "x.h5",
        "consolidated.safetensors", "pytorch_model.bin.index.json", "quantize_config.json", "qkit_manifest.json",
        "a:b.json", "training_args.bin", "trainer_state.json", "optimizer.pt", "flax_model.msgpack",
    ]  # fmt: skip
    for name in carried + left:
        (folder / name).write_text(name)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    source = FolderSource(folder)
    expected = [*sorted([*carried, "tokenizer.json"]), "additional_chat_templates/tools.jinja"]
    assert [s.name for s in source.sidecars] == expected
    assert next(s for s in source.sidecars if s.name == "merges.txt").read() == b"merges.txt"


def test_links_into_a_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    tensors = make_sharded(snapshot)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        shutil.move(path, blobs / str(i))
        path.symlink_to(os.path.join("..", "..", "blobs", str(i)))
    source = FolderSource(snapshot)
    assert source.base_model == "org/name"
    assert torch.equal(source.read("model.layers.10.w"), tensors["model.layers.10.w"])
    (snapshot / "merges.txt").symlink_to("../../blobs/absent")
    with pytest.raises(QkitError, match=r"merges\.txt is a link"):
        FolderSource(snapshot)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/name", "org/name"), ("/home/x/name", None), ("./a/b", None), ("", None), (None, None), (3, None)],
)
def test_base_model(tmp_path: Path, name: object, expected: str) -> None:
    make_sharded(tmp_path / "m", {"model_type": "llama", "_name_or_path": name})
    assert FolderSource(tmp_path / "m").base_model == (expected or "llama model")


def test_quantized_source_opens(tmp_path: Path) -> None:
    make_sharded(tmp_path / "m", {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})
    assert FolderSource(tmp_path / "m").config["quantization_config"] == {"quant_method": "gptq"}


def test_fingerprint(tmp_path: Path) -> None:
    make_sharded(tmp_path / "m")
    first = FolderSource(tmp_path / "m").fingerprint
    shutil.copytree(tmp_path / "m", tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / SHARDS[0], (1, 1))
    assert FolderSource(tmp_path / "elsewhere").fingerprint == first

    def changed(name: str, text: str) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "m", copy)
        (copy / name).write_text(text)
        fingerprint = FolderSource(copy).fingerprint
        shutil.rmtree(copy)
        return fingerprint

    assert changed("config.json", '{"model_type": "mistral"}') != first
    assert changed("tokenizer.json", "{} ") != first
    assert changed("vocab.json", "{}") != first
    save_file({f"model.layers.{i}.w": torch.zeros(4, 3) for i in range(6)}, tmp_path / "m" / SHARDS[0])
    assert FolderSource(tmp_path / "m").fingerprint != first  # same header, other weights


def test_single_file_wins_over_an_index(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    save_file({"only": torch.ones(2)}, tmp_path / "model.safetensors")
    assert FolderSource(tmp_path).names() == ["only"]


def test_one_file_of_another_name(tmp_path: Path) -> None:
    save_file({"only": torch.ones(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert FolderSource(tmp_path).names() == ["only"]


def test_tensor_the_index_forgot_belongs_to_the_model(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    names = weight_map(tmp_path)
    del names["model.layers.3.w"]
    write_index(tmp_path, names)
    assert "model.layers.3.w" in FolderSource(tmp_path).names()


def test_second_copies(tmp_path: Path) -> None:
    tensors = make_sharded(tmp_path)
    second = {n: t for n, t in tensors.items() if weight_map(tmp_path)[n] == SHARDS[1]}
    save_file({**second, "model.layers.0.w": torch.zeros(4, 3)}, tmp_path / SHARDS[1])
    assert torch.equal(FolderSource(tmp_path).read("model.layers.0.w"), tensors["model.layers.0.w"])
    names = weight_map(tmp_path)
    del names["model.layers.0.w"]
    write_index(tmp_path, names)
    with pytest.raises(QkitError, match="does not say which counts"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", ".hidden.safetensors", "a\\b.safetensors",
     "c:x.safetensors", "x\0.safetensors", "config.json", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_index_that_points_outside(tmp_path: Path, shard: object) -> None:
    make_sharded(tmp_path / "m")
    save_file({"model.layers.0.w": torch.ones(4, 3)}, tmp_path / "other.safetensors")
    write_index(tmp_path / "m", {**weight_map(tmp_path / "m"), "model.layers.0.w": shard})
    with pytest.raises(QkitError, match="not a safetensors file in its folder"):
        FolderSource(tmp_path / "m")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    write_index(tmp_path, {**weight_map(tmp_path), "model.ghost": SHARDS[1]})
    with pytest.raises(QkitError, match=r"model\.ghost"):
        FolderSource(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(QkitError, match=f"lacks 1 of 2 shards: {SHARDS[1]}"):
        FolderSource(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": []}')
    with pytest.raises(QkitError, match="no weight_map"):
        FolderSource(tmp_path)
    (tmp_path / INDEX).unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "second.safetensors")
    with pytest.raises(QkitError, match="2 safetensors files and no model"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("", "not valid JSON"), ("[]", "a JSON list"), ("{", "valid JSON"), ("\xff", "valid JSON")]
)
def test_broken_config(tmp_path: Path, text: str, message: str) -> None:
    make_sharded(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(QkitError, match=message):
        FolderSource(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(QkitError, match=r"no config\.json"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pytorch_model.bin", "save_pretrained"), ("pytorch_model-00001-of-00002.bin", "save_pretrained"),
     ("consolidated.00.pth", "save_pretrained"), ("model.pt", "save_pretrained"), ("adapter_config.json", "--lora"),
     ("model.Q4_K.gguf", ".gguf file itself"), ("notes.txt", "model.safetensors")],
)  # fmt: skip
def test_folders_without_safetensors(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("{}")
    with pytest.raises(QkitError) as caught:
        FolderSource(tmp_path)
    assert hint in (caught.value.hint or "")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_index(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / INDEX).exists():
        make_sharded(tmp_path)
        (tmp_path / "good").write_bytes((tmp_path / INDEX).read_bytes())
    raw = bytearray((tmp_path / "good").read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    (tmp_path / INDEX).write_bytes(raw)
    try:
        source = FolderSource(tmp_path)
    except QkitError:
        return
    assert len(source.names()) >= 12


@given(st.lists(st.text("ab.0123456789²٣", max_size=12), max_size=8))
def test_natural_key_orders_anything(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural_key)) == sorted(names)


def test_names() -> None:
    assert sorted(["l.10.w", "l.2.w", "l.w", "l.02.w", "10", "9"], key=natural_key) == [
        "9", "10", "l.02.w", "l.2.w", "l.10.w", "l.w",
    ]  # fmt: skip
    assert is_plain_name("a b.safetensors") and not is_plain_name("a/b") and not is_plain_name("x" * 256)
    assert is_inside("a/b.json") and not any(map(is_inside, ("../a", "a/../b", "/a", "a//b", "", "a/", None)))


def test_system_errors_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sharded(tmp_path)

    def refuse(*_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied", str(tmp_path / "config.json"))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(QkitError, match=r"cannot read .*: Permission denied") as caught:
        FolderSource(tmp_path)
    assert "permissions" in (caught.value.hint or "")
