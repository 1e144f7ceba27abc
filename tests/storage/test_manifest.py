"""The manifest: deterministic, strict when read, and it finds every change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkit.errors import QkitError
from qkit.storage.local import LocalStore
from qkit.storage.manifest import MANIFEST, Manifest, file_entry
from qkit.storage.writer import write_file

ENTRY = {"sha256": "0" * 64, "bytes": 1}


def make(folder: Path) -> Manifest:
    manifest = Manifest({"scheme": "w4a16", "source": "é"}, complete=True)
    for name in ("model-00001.safetensors", "config.json", "sub/x.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        manifest.files[name] = file_entry(write_file(LocalStore(folder), name, name.encode() * 1000))
    manifest.tensors["a"] = {"scheme": "int4", "rmse": 0.25}
    manifest.save(folder)
    return manifest


def test_round_trip_and_determinism(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    first = (tmp_path / MANIFEST).read_bytes()
    assert Manifest.load(tmp_path) == manifest
    shuffled = Manifest(
        dict(reversed(manifest.identity.items())), dict(reversed(manifest.files.items())), manifest.tensors, {}, True
    )
    shuffled.save(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == first
    assert json.loads(first)["schema"] == 1
    with pytest.raises(ValueError):
        Manifest({"a": float("nan")}).save(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == first


def test_verify(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    seen: list[int] = []
    assert manifest.verify(tmp_path, seen.append) == []
    assert sum(seen) == sum(entry["bytes"] for entry in manifest.files.values())
    (tmp_path / "config.json").write_bytes(b"CONFIG.JSON" + b"config.json" * 999)
    (tmp_path / "model-00001.safetensors").write_bytes(b"short")
    (tmp_path / "sub" / "x.jinja").unlink()
    (tmp_path / "stray.safetensors").write_bytes(b"")
    manifest.complete = False
    assert manifest.verify(tmp_path) == [
        "config.json: its content changed (SHA-256 differs)",
        "model-00001.safetensors: 5 bytes, expected 23000",
        "sub/x.jinja: missing",
        "stray.safetensors: not in the manifest",
        "the conversion is not complete",
    ]


def test_verify_reports_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qkit.storage import manifest as module

    manifest = make(tmp_path)

    def refuse(store: LocalStore, name: str, progress: object) -> None:
        raise QkitError(f"cannot read {name}: Input/output error")

    monkeypatch.setattr(module, "hash_file", refuse)
    assert manifest.verify(tmp_path)[0] == "config.json: cannot read config.json: Input/output error"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": None}, {"schema": 2}, {"schema": "1"}, {"schema": True}, {"complete": 1}, {"identity": []},
        {"files": None}, {"tensors": {"a": 1}}, {"files": {"a": 3}}, {"files": {"a": {"sha256": "0" * 64}}},
        {"files": {"a": {**ENTRY, "sha256": "0" * 63 + "G"}}}, {"files": {"a": {**ENTRY, "bytes": -1}}},
        {"files": {"a": {**ENTRY, "bytes": True}}}, {"files": {"../a": ENTRY}}, {"files": {"/etc/passwd": ENTRY}},
        {"files": {"a/../../b": ENTRY}}, {"files": {"": ENTRY}}, {"files": {"a\\..\\b": ENTRY}},
        {"files": {MANIFEST: ENTRY}},
    ],
)  # fmt: skip
def test_load_is_strict(tmp_path: Path, change: dict[str, Any]) -> None:
    make(tmp_path)
    table = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**table, **change}))
    with pytest.raises(QkitError) as caught:
        Manifest.load(tmp_path)
    assert caught.value.hint


def test_absent_and_garbage(tmp_path: Path) -> None:
    with pytest.raises(QkitError, match="has no qkit_manifest"):
        Manifest.load(tmp_path)
    for garbage in (b"", b"[]", b"\xff\xfe", b"{}", b"[" * 100_000):
        (tmp_path / MANIFEST).write_bytes(garbage)
        with pytest.raises(QkitError):
            Manifest.load(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "sub").mkdir(exist_ok=True)
    Manifest({"a": 1}, {"x.json": dict(ENTRY)}, {"t": {}}).save(tmp_path)
    raw = bytearray((tmp_path / MANIFEST).read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=4))
    (tmp_path / MANIFEST).write_bytes(raw)
    try:
        manifest = Manifest.load(tmp_path)
    except QkitError:
        return
    assert all(isinstance(problem, str) for problem in manifest.verify(tmp_path))
