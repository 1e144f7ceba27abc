"""The GGUF header parser: what it reads, and that damage of any kind is a QkitError and nothing else."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkit.errors import QkitError
from qkit.kernels.ggml import readable
from qkit.sources.gguf import file as ours
from qkit.sources.gguf.file import GgufFile


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def strings(*texts: str) -> bytes:
    return struct.pack("<IQ", 8, len(texts)) + b"".join(map(string, texts))


PAIRS = (
    pair("general.architecture", 8, string("llama")),
    pair("numbers", 9, struct.pack("<IQ3i", 5, 3, -1, 0, 7)),
    pair("flag", 7, b"\1"),
    pair("words", 9, strings("one", "", "drei größe")),
)
F32 = np.arange(64, dtype=np.float32)
Q8 = np.random.default_rng(0).integers(-127, 128, 64).astype(np.int8)
Q8_BYTES = b"".join(np.float16(0.5).tobytes() + Q8[i : i + 32].tobytes() for i in (0, 32))


def image(pairs=PAIRS, tensors=None, *, version=3, magic=b"GGUF", counts=None, data=None, alignment=32) -> bytes:
    tensors = tensors or (tensor("a", [32, 2], 0, 0), tensor("b", [32, 1, 2], 8, 256))
    counts = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<I2Q", version, *counts) + b"".join(pairs) + b"".join(tensors)
    head += bytes(-len(head) % alignment)
    return head + (F32.tobytes() + Q8_BYTES if data is None else data)


@pytest.fixture
def opened(tmp_path):
    def write(raw: bytes) -> GgufFile:
        path = tmp_path / "m.gguf"
        path.write_bytes(raw)
        return GgufFile(path)

    return write


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_was_written(opened, version):
    file = opened(image(version=version))
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["numbers"] == (-1, 0, 7) and file.metadata["flag"] is True
    words = file.metadata["words"]
    assert len(words) == 3 and list(words) == list(words) == ["one", "", "drei größe"]
    assert file.tensors["b"].shape == (2, 1, 32) and file.tensors["b"].type.name == "Q8_0"
    assert torch.equal(file.read("a", torch.float32), torch.from_numpy(F32).view(2, 32))
    expected = torch.from_numpy(Q8).float().mul(0.5).view(2, 1, 32)
    assert torch.equal(file.read("b", torch.bfloat16), expected.to(torch.bfloat16))
    assert torch.equal(file.read("b", torch.float32, index=1), expected[1])


def test_pieces_of_any_size_give_the_same(opened, monkeypatch):
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 64, 34 * 1000, dtype=np.uint8)
    file = opened(image(tensors=(tensor("t", [32, 1000], 8, 0),), data=raw.tobytes()))
    whole = file.read("t", torch.float32)
    monkeypatch.setattr(ours, "_DATA_READ", 34 * 7 + 5)
    assert torch.equal(file.read("t", torch.float32), whole)


def test_vocabulary_longer_than_one_read(opened):
    words = [f"wört{i}" * 3 for i in range(20000)]
    file = opened(image(pairs=(*PAIRS[:3], pair("words", 9, strings(*words)))))
    assert list(file.metadata["words"]) == words and file.metadata["flag"] is True


HUGE = struct.pack("<Q", 1 << 62)
BAD = {
    "magic": (image(magic=b"GGML"), "b'GGUF'"),
    "empty": (b"", "ends at byte 0"),
    "version 1": (image(version=1), "version 1"),
    "version 9": (image(version=9), "version 9"),
    "big-endian": (image(version=3 << 24), "big-endian"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    "pair count": (image(counts=(2, 1 << 60)), "claims 1152921504606846976 metadata pairs"),
    "tensor count": (image(counts=(1 << 40, 4)), "1099511627776 tensors"),
    "one pair too many": (image(counts=(2, 5)), "claims a string|ends|appears|type"),
    "string length": (image(pairs=(pair("k", 8, HUGE),)), "'k' claims a string of"),
    "key length": (image(pairs=(HUGE + b"key",)), "key of metadata pair 0 claims"),
    "string past the end": (image(pairs=(pair("k", 8, struct.pack("<Q", 1 << 20)),)), "inside metadata 'k'"),
    "array count": (image(pairs=(pair("k", 9, struct.pack("<IQ", 4, 1 << 50)),)), "array of 1125899906842624"),
    "array past the end": (image(pairs=(pair("k", 9, struct.pack("<IQ", 4, 1 << 20)),)), "inside metadata 'k'"),
    "string array": (image(pairs=(pair("k", 9, struct.pack("<IQ", 8, 3) + HUGE),)), "inside metadata 'k'"),
    "array of arrays": (image(pairs=(pair("k", 9, struct.pack("<IQ", 9, 1)),)), "value type 9"),
    "value type": (image(pairs=(pair("k", 13, b""),)), "unknown value type 13"),
    "not UTF-8": (image(pairs=(pair("k", 8, string(b"\xff\xfe")),)), "not UTF-8"),
    "same key": (image(pairs=(*PAIRS, PAIRS[0])), "appears twice"),
    "alignment": (image(pairs=(pair("general.alignment", 4, struct.pack("<I", 24)),)), "power of two"),
    "alignment type": (image(pairs=(pair("general.alignment", 8, string("32")),)), "power of two"),
    "no dimensions": (image(tensors=(tensor("a", [], 0, 0),)), "0 dimensions"),
    "many dimensions": (image(tensors=(tensor("a", [1] * 9, 0, 0),)), "9 dimensions"),
    "zero dimension": (image(tensors=(tensor("a", [32, 0], 0, 0),)), "impossible shape"),
    "overflow": (image(tensors=(tensor("a", [1 << 32, 1 << 32], 0, 0),)), "impossible shape"),
    "ggml type": (image(tensors=(tensor("a", [32, 2], 99, 0),)), "unknown ggml type 99"),
    "removed type": (image(tensors=(tensor("a", [32, 2], 4, 0),)), "unknown ggml type 4"),
    "block size": (image(tensors=(tensor("a", [31, 2], 8, 0),)), "rows of 31"),
    "same tensor": (image(tensors=(tensor("a", [32], 0, 0), tensor("a", [32], 0, 128))), "appears twice"),
    "misaligned": (image(tensors=(tensor("a", [32], 0, 4),)), "not aligned to 32"),
    "outside": (image(tensors=(tensor("a", [32], 0, 1 << 40),)), "inside tensor 'a'"),
    "offset overflow": (image(tensors=(tensor("a", [32], 0, (1 << 64) - 32),)), "inside tensor 'a'"),
    "too large": (image(tensors=(tensor("a", [32, 1000], 0, 0),)), "inside tensor 'a'"),
    "overlap": (image(tensors=(tensor("a", [32, 2], 0, 0), tensor("b", [32], 0, 128))), "overlaps"),
    "name": (image(tensors=(tensor("a" * 5000, [32], 0, 0),)), "string of 5000"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(opened, case):
    raw, message = BAD[case]
    with pytest.raises(QkitError, match=message) as caught:
        opened(raw)
    assert "m.gguf" in caught.value.message and caught.value.hint


def test_every_truncation_is_refused(opened):
    raw = image()
    for length in range(len(raw)):
        with pytest.raises(QkitError):
            opened(raw[:length])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 500), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_mutations_are_read_or_refused(opened, edits):
    """Overwritten bytes anywhere: a QkitError, or a file whose every tensor can be read."""
    raw = bytearray(image())
    for at, piece in edits:
        at %= len(raw)
        raw[at : at + len(piece)] = piece
    try:
        file = opened(bytes(raw))
    except QkitError:
        return
    for name, info in file.tensors.items():
        if readable(info.type):
            assert file.read(name, torch.float32).shape == info.shape


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_noise_is_refused(opened, noise):
    with pytest.raises(QkitError):
        opened(b"GGUF\3\0\0\0\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0" + noise)


def split_files(folder, count=2):
    for i in range(count):
        pairs = [pair("split.no", 2, struct.pack("<H", i)), pair("split.count", 2, struct.pack("<H", count))]
        raw = image((*PAIRS, *pairs) if i == 0 else pairs, (tensor(f"t{i}", [32, 2], 0, 0),), data=(F32 + i).tobytes())
        (folder / f"m-{i + 1:05}-of-{count:05}.gguf").write_bytes(raw)
    return folder / f"m-00001-of-{count:05}.gguf"


def test_split_file(tmp_path):
    file = GgufFile(split_files(tmp_path, 3))
    for i in range(3):
        assert torch.equal(file.read(f"t{i}", torch.float32).flatten(), torch.from_numpy(F32 + i))


def test_split_file_refusals(tmp_path):
    first = split_files(tmp_path)
    second = tmp_path / "m-00002-of-00002.gguf"
    with pytest.raises(QkitError, match="not the first part") as caught:
        GgufFile(second)
    assert first.name in caught.value.hint
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(QkitError, match="its name does not"):
        GgufFile(renamed)
    second.write_bytes(first.read_bytes())
    with pytest.raises(QkitError, match="is not part 2 of 2"):
        GgufFile(first)
    second.unlink()
    with pytest.raises(QkitError, match="m-00002-of-00002"):
        GgufFile(first)


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(QkitError, match="nothing"):
        GgufFile(tmp_path / "nothing.gguf")
    with pytest.raises(QkitError):
        GgufFile(tmp_path)
