"""The writer: exact files, and nothing under the final name unless all of it is there."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qkit.errors import QkitError
from qkit.spec.dtypes import TensorMeta, dtype_name
from qkit.storage import local, writer
from qkit.storage.local import LocalStore, remove_temporaries
from qkit.storage.safetensors import SafetensorsFile
from qkit.storage.store import FileDigest
from qkit.storage.writer import file_bytes


def write_file(path: Path, data: bytes) -> FileDigest:
    return writer.write_file(LocalStore(path.parent), path.name, data)


def write_safetensors(path: Path, *given: Any) -> FileDigest:
    return writer.write_safetensors(LocalStore(path.parent), path.name, *given)


def entries_of(tensors: dict[str, torch.Tensor]) -> list[tuple[str, TensorMeta]]:
    return [(n, TensorMeta(dtype_name(t.dtype), tuple(t.shape))) for n, t in tensors.items()]


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "odd": torch.randint(0, 255, (3,)).to(torch.uint8),  # leaves what follows unaligned
        "w.packed": torch.randint(-(2**31), 2**31 - 1, (17, 5)).to(torch.int32),
        "scale": torch.randn(17, 1).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "flag": torch.tensor([True, False]),
        "strided": torch.randn(9, 4).t(),
        "large": torch.randn(1500, 1100),  # more than one chunk
        "shape": torch.tensor([17, 40]),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
    }


def test_the_reference_package_reads_it_back(tmp_path: Path) -> None:
    tensors = some_tensors()
    entries = entries_of(tensors)
    path = tmp_path / "m.safetensors"
    digest = write_safetensors(path, entries, iter(tensors.values()))
    raw = path.read_bytes()
    assert digest.sha256 == hashlib.sha256(raw).hexdigest()
    assert digest.nbytes == len(raw) == file_bytes(entries)
    assert (8 + int.from_bytes(raw[:8], "little")) % 8 == 0
    loaded, ours = load_file(path), SafetensorsFile(path)
    assert set(loaded) == set(tensors) and ours.names() == list(tensors)
    for name, expected in tensors.items():
        same = expected.contiguous().view(-1).view(torch.uint8)
        for found in (loaded[name], ours.read(name)):
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert torch.equal(found.view(-1).view(torch.uint8), same)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_metadata_and_no_tensors(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", [], [], {"é": "ü"})
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"é": "ü"} and not list(file.keys())


def test_a_tensor_may_be_reused_once_the_next_is_asked_for(tmp_path: Path) -> None:
    buffer = torch.empty(1 << 20)

    def produce() -> Iterator[torch.Tensor]:
        for i in range(5):
            yield buffer.fill_(i)

    entries = [(f"t{i}", TensorMeta("F32", (1 << 20,))) for i in range(5)]
    digest = write_safetensors(tmp_path / "m.safetensors", entries, produce())
    assert digest.sha256 == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    loaded = load_file(tmp_path / "m.safetensors")
    assert all(bool((loaded[f"t{i}"] == i).all()) for i in range(5))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.ones(2)], "1 tensors where 2"),
        ([torch.ones(2)] * 3, "more tensors"),
        ([torch.ones(2), torch.ones(3)], "announced"),
        ([torch.ones(2), torch.ones(2).half()], "announced"),
    ],
)
def test_tensors_that_differ_from_the_entries(tmp_path: Path, tensors: list[torch.Tensor], message: str) -> None:
    entries = [("a", TensorMeta("F32", (2,))), ("b", TensorMeta("F32", (2,)))]
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "m.safetensors", entries, tensors)
    assert not os.listdir(tmp_path)


def test_names_that_cannot_be(tmp_path: Path) -> None:
    meta = TensorMeta("F32", (1,))
    for names in (["a", "a"], ["__metadata__"]):
        with pytest.raises(ValueError, match="reserved or appears twice"):
            write_safetensors(tmp_path / "m", [(n, meta) for n in names], [torch.ones(1)] * len(names))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_failing_producer_leaves_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "m.safetensors"
    write_file(path, b"old")

    def produce() -> Iterator[torch.Tensor]:
        yield torch.ones(100_000)
        raise failure("stop")

    with pytest.raises(failure, match="stop"):
        write_safetensors(path, [("a", TensorMeta("F32", (100_000,))), ("b", TensorMeta("F32", (1,)))], produce())
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["m.safetensors"]


def test_write_file(tmp_path: Path) -> None:
    data = os.urandom(local._CHUNK + 12345)
    first = write_file(tmp_path / "a", data)
    assert first.sha256 == hashlib.sha256(data).hexdigest() and first.nbytes == len(data)
    assert (tmp_path / "a").read_bytes() == data
    write_file(tmp_path / "a", b"")
    assert (tmp_path / "a").read_bytes() == b""
    assert os.listdir(tmp_path) == ["a"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_unwritable_places(tmp_path: Path) -> None:
    with pytest.raises(QkitError, match="No such file"):
        write_file(tmp_path / "absent" / "a", b"x")
    (tmp_path / "file").write_text("")
    with pytest.raises(QkitError, match="cannot write"):
        write_file(tmp_path / "file" / "a", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(QkitError, match="cannot write"):
        write_file(tmp_path / "folder", b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(QkitError, match="Permission") as caught:
            write_file(tmp_path / "a", b"x")
    finally:
        tmp_path.chmod(0o700)
    assert "permissions" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permissions"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fdatasync", "fsync", "replace"])
def test_system_errors_carry_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, hint: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local.os, call, refuse)
    monkeypatch.setattr(local, "_SYNC", 1 << 16)
    with pytest.raises(QkitError) as caught:
        write_file(tmp_path / "a", b"x" * 100_000)
    monkeypatch.undo()
    assert hint in (caught.value.hint or "") and str(tmp_path / "a") in caught.value.message
    assert not os.listdir(tmp_path)


def test_file_size_limit(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(QkitError, match="too large") as caught:
            write_safetensors(tmp_path / "m", [("a", TensorMeta("F32", (1 << 20,)))], [torch.ones(1 << 20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "ulimit" in (caught.value.hint or "")
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def full(path: str, flags: int, mode: int = 0o777) -> int:
        return real_open("/dev/full", os.O_WRONLY) if flags & os.O_EXCL else real_open(path, flags, mode)

    monkeypatch.setattr(local.os, "open", full)
    with pytest.raises(QkitError, match="No space left") as caught:
        write_safetensors(tmp_path / "m", [("a", TensorMeta("F32", (100,)))], [torch.ones(100)])
    assert "disk is full" in (caught.value.hint or "")


KILLED = """
import sys, time, torch
from pathlib import Path
from qkit.storage.local import LocalStore
from qkit.storage.writer import write_safetensors
from qkit.spec.dtypes import TensorMeta
def produce():
    yield torch.ones(100_000)
    print("half", flush=True)
    time.sleep(60)
    yield torch.ones(100_000)
path = Path(sys.argv[1])
write_safetensors(LocalStore(path.parent), path.name, [(n, TensorMeta("F32", (100_000,))) for n in "ab"], produce())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_mid_write(tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "m.safetensors"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        time.sleep(0.05)
        process.send_signal(how)
        assert process.wait() != 0
    assert not path.exists()
    left = os.listdir(tmp_path)
    if how == signal.SIGINT:
        assert not left
    else:
        assert len(left) == 1 and left[0].startswith(".") and remove_temporaries(tmp_path) == 1
        assert not os.listdir(tmp_path)


def test_remove_temporaries_spares_the_rest(tmp_path: Path) -> None:
    for name in ("model.safetensors", ".hidden", "x.qkit-tmp"):
        (tmp_path / name).write_text("")
    assert remove_temporaries(tmp_path) == 0
    assert len(os.listdir(tmp_path)) == 3
