"""The safetensors reader: exact against the reference package, and safe on any bytes at all."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qkit.errors import QkitError
from qkit.storage.safetensors import SafetensorsFile, parse_header

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def tensor(dtype: str = "F32", shape: list[int] | None = None, offsets: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": offsets or [0, 8]}


def samples() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    found = {f"float.{i}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate(dtypes)}
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        found[str(dtype)] = torch.randint(-100, 100, (7, 3)).to(dtype)
    found |= {"bool": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    return found | {"ünïcode": torch.ones(1, 1, 2, 1), "big": torch.randn(1000, 257)}


def test_reads_what_the_reference_package_wrote(tmp_path: Path) -> None:
    tensors = samples()
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "note": "x"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert sorted(file.names()) == sorted(tensors)
    assert file.metadata == {"format": "pt", "note": "x"}
    for name, expected in tensors.items():
        found = file.read(name)
        assert found.dtype == expected.dtype and file.meta(name).shape == tuple(expected.shape)
        assert found.shape == expected.shape and found.is_contiguous()
        assert torch.equal(found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
    with pytest.raises(KeyError):
        file.read("absent")


def test_memory_is_its_own(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8)}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    file.read("a").fill_(1)
    assert file.read("a").sum() == 0


def test_threads_read_the_right_tensors(tmp_path: Path) -> None:
    expected = {f"t{i}": torch.full((64, 65), i) for i in range(40)}
    save_file(expected, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    names = list(expected) * 5
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(names, pool.map(file.read, names), strict=True):
            assert torch.equal(found, expected[name])


BROKEN: dict[str, tuple[object, bytes, str]] = {
    "unknown dtype": ({"a": tensor("F3")}, bytes(8), "unknown dtype"),
    "dtype is not text": ({"a": {**tensor(), "dtype": ["F32"]}}, bytes(8), "unknown dtype"),
    "negative dimension": ({"a": tensor(shape=[-2])}, bytes(8), "invalid shape"),
    "fractional dimension": ({"a": {**tensor(), "shape": [2.0]}}, bytes(8), "invalid shape"),
    "boolean dimension": ({"a": {**tensor(), "shape": [2, True]}}, bytes(8), "invalid shape"),
    "overflowing shape": ({"a": tensor(shape=[0, 1 << 62, 4], offsets=[0, 0])}, b"", "invalid shape"),
    "offsets too short": ({"a": tensor(offsets=[0, 4])}, bytes(4), "takes 8 bytes"),
    "offsets reversed": ({"a": tensor(offsets=[8, 0])}, bytes(8), "takes 8 bytes"),
    "offsets not a pair": ({"a": tensor(offsets=[0, 8, 8])}, bytes(8), "data_offsets"),
    "outside the file": ({"a": tensor(offsets=[0, 8])}, bytes(4), "describes"),
    "bytes left over": ({"a": tensor()}, bytes(9), "describes"),
    "hole": ({"a": tensor(), "b": tensor(offsets=[16, 24])}, bytes(24), "hole"),
    "overlap": ({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12), "overlaps"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "lacks"),
    "entry is a number": ({"a": 3}, b"", "lacks"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata is a list": ({"__metadata__": [1]}, b"", "__metadata__"),
    "a list": (b"[]", b"", "begin"),
    "leading blank": (b" {}", b"", "begin"),
    "not JSON": (b"{nonsense", b"", "valid safetensors"),
    "not UTF-8": (b'{"\xff":1}', b"", "valid safetensors"),
    "lone surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "surrogates"),
    "duplicate tensor": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "twice"),
    "duplicate field": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}', b"", "twice"),
    "NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', b"", "NaN"),
    "deep nesting": (b'{"a":' + b"[" * 200_000, b"", "valid safetensors"),
    "endless number": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,0]}}', b"", "valid"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(tmp_path: Path, case: str) -> None:
    header, data, message = BROKEN[case]
    with pytest.raises(QkitError, match=message) as caught:
        SafetensorsFile(write_raw(tmp_path / "m.safetensors", header, data))
    assert caught.value.hint and str(tmp_path) in caught.value.message


@pytest.mark.parametrize("length", [0, 1, 7, 13, 1 << 20, (1 << 63) + 5, (1 << 64) - 1])
def test_header_that_lies_about_its_length(tmp_path: Path, length: int) -> None:
    with pytest.raises(QkitError, match="not a valid safetensors file"):
        SafetensorsFile(write_raw(tmp_path / "m.safetensors", {"a": tensor()}, bytes(8), length))


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    save_file({"a": torch.randn(5), "b": torch.ones(3, 2)}, tmp_path / "m.safetensors")
    raw = (tmp_path / "m.safetensors").read_bytes()
    for size in range(len(raw)):
        (tmp_path / "t.safetensors").write_bytes(raw[:size])
        with pytest.raises(QkitError):
            SafetensorsFile(tmp_path / "t.safetensors")


def test_oversized_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with open(path, "wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # sparse: takes no disk
    with pytest.raises(QkitError, match="limit"):
        SafetensorsFile(path)


def test_lfs_pointer_absent_and_folder(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(QkitError, match="LFS") as caught:
        SafetensorsFile(tmp_path / "m.safetensors")
    assert caught.value.hint == "run: git lfs pull"
    with pytest.raises(QkitError, match="cannot read"):
        SafetensorsFile(tmp_path / "absent.safetensors")
    with pytest.raises(QkitError, match="not a regular file"):
        SafetensorsFile(tmp_path)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.randn(1000)}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    os.truncate(tmp_path / "m.safetensors", 1000)
    with pytest.raises(QkitError, match="changed"):
        file.read("a")


def test_samples_follow_content_and_not_the_place(tmp_path: Path) -> None:
    def sample(name: str, value: float) -> bytes:
        save_file({"a": torch.full((3000,), value)}, tmp_path / name)
        return SafetensorsFile(tmp_path / name).sample("a")

    first = sample("a.safetensors", 1.0)
    assert sample("b.safetensors", 1.0) == first
    assert sample("c.safetensors", 2.0) != first


@FUZZ
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_header_bytes(raw: bytes, file_bytes: int) -> None:
    for header in (raw, b"{" + raw, b"{" + raw + b"}"):
        try:
            entries, _ = parse_header(header, file_bytes)
        except ValueError:
            continue
        assert sum(entry.meta.nbytes for entry in entries.values()) + 8 + len(header) == file_bytes


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70) | st.floats() | st.sampled_from(["F32", "U8", "", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@FUZZ
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON, max_size=3))
def test_any_json(table: dict[str, object]) -> None:
    header = json.dumps(table).encode()
    try:
        parse_header(header, 8 + len(header))
    except ValueError:
        return
    assert all(not entry.meta.nbytes for entry in parse_header(header, 8 + len(header))[0].values())


@FUZZ
@given(st.data())
def test_mutated_files(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.uint8)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not raw:
            break
    path.write_bytes(raw)
    try:
        file = SafetensorsFile(path)
    except QkitError:
        return
    for name in file.names():
        assert file.read(name).numel() == file.meta(name).numel


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "C64", "F8_E4M3FNUZ", "F128", "Q9"])
def test_a_newer_dtype_is_not_called_damage(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(QkitError, match=dtype) as caught:
        SafetensorsFile(tmp_path / "m")
    assert "damaged" not in str(caught.value) and "newer" in (caught.value.hint or "")
