"""The seam: readers and writers reach files only through a `Store`. This one keeps them in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from models import make_model

from qkit.errors import QkitError
from qkit.sources.folder import FolderSource
from qkit.sources.gguf import GgufFile
from qkit.spec.dtypes import TensorMeta
from qkit.storage.local import LocalStore
from qkit.storage.manifest import MANIFEST, Manifest, file_entry
from qkit.storage.safetensors import SafetensorsFile
from qkit.storage.store import FileDigest, Reader, Store, hash_file, read_file
from qkit.storage.writer import write_file, write_safetensors


class MemoryFile:
    def __init__(self, name: str, data: bytes):
        self.name, self.label, self.data, self.nbytes = name, f"memory:{name}", data, len(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        piece = self.data[offset : offset + len(buffer)]
        if len(piece) < len(buffer):
            raise QkitError(f"{self.label} changed while it was being read")
        buffer[:] = piece

    def close(self) -> None:
        pass


class MemoryStore:
    label = "memory:"

    def __init__(self, files: dict[str, bytes] | None = None):
        self.files = files or {}

    def names(self, folder: str = "") -> list[str]:
        return sorted(name for name in self.files if name.rpartition("/")[0] == folder)

    def has(self, name: str) -> bool:
        return name in self.files

    def open(self, name: str) -> Reader:
        if name not in self.files:
            raise QkitError(f"cannot read memory:{name}: No such file or directory")
        return MemoryFile(name, self.files[name])

    def write(self, name: str, chunks: Iterable[memoryview]) -> FileDigest:
        self.files[name] = b"".join(bytes(chunk) for chunk in chunks)
        return FileDigest(hashlib.sha256(self.files[name]).hexdigest(), len(self.files[name]))


def in_memory(folder: Path) -> MemoryStore:
    return MemoryStore({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


def test_a_checkpoint_is_read_from_anywhere(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", max_shard_size="200KB")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    there, here = FolderSource(in_memory(folder)), FolderSource(folder)
    assert there.names() == here.names() and there.config == here.config and there.stored == here.stored
    assert (there.fingerprint, there.metadata) == (here.fingerprint, {"license": "mit"})
    for name in here.names():
        assert torch.equal(there.read(name), here.read(name))
    assert [(s.name, s.read(), s.nbytes) for s in there.sidecars] == [
        (s.name, s.read(), s.nbytes) for s in here.sidecars
    ]
    assert any(s.name == "additional_chat_templates/tool.jinja" for s in there.sidecars)
    store = in_memory(folder)
    del store.files[next(name for name in store.files if name.startswith("model-00002"))]
    with pytest.raises(QkitError, match="memory: lacks 1 of"):
        FolderSource(store)


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_what_is_written_is_the_same_everywhere(tmp_path: Path, place: str) -> None:
    store: Store = MemoryStore() if place == "memory" else LocalStore(tmp_path)
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "c": torch.zeros(0, 2)}
    kinds = {"a": "BF16", "b": "I64", "c": "F32"}
    entries = [(name, TensorMeta(kinds[name], tuple(t.shape))) for name, t in tensors.items()]
    written = write_safetensors(store, "m.safetensors", entries, tensors.values())
    file = SafetensorsFile(store.open("m.safetensors"))
    assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())
    assert written == hash_file(store, "m.safetensors") and written.nbytes == file.nbytes
    manifest = Manifest({"qkit": "1"}, {"m.safetensors": file_entry(written)}, complete=True)
    manifest.save(store)
    assert Manifest.find(store) == manifest and manifest.verify(store) == []
    write_file(store, "m.safetensors", b"other")
    write_file(store, "deeper/stray.txt", b"")
    assert store.names() == ["m.safetensors", MANIFEST] and store.names("deeper") == ["deeper/stray.txt"]
    assert store.names("absent") == [] and read_file(store, "deeper/stray.txt") == b""
    assert manifest.verify(store) == [f"m.safetensors: 5 bytes, expected {written.nbytes}"]
    assert Manifest.find(None) is None
    with pytest.raises(QkitError, match="No such file"):
        store.open("absent")


def test_a_gguf_file_is_read_from_anywhere(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a", torch.arange(64).float().view(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    store = in_memory(tmp_path)
    there, here = GgufFile(store.open("m.gguf"), store), GgufFile(tmp_path / "m.gguf")
    assert torch.equal(there.read("a", torch.bfloat16), here.read("a", torch.bfloat16))
    assert there.fingerprint() == here.fingerprint()
