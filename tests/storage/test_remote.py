"""Objects as files, whatever library fetches them: tries, pins, ranges, parts; the lock; results in an object store."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model

import qkit
from qkit.conversion import remote_workspace
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.sources import open_source
from qkit.storage import lease, object_store, remote
from qkit.storage.lease import LOCK, Lease
from qkit.storage.manifest import MANIFEST, Manifest
from qkit.storage.places import Place, parse_place
from qkit.storage.remote import Found, Passing, RemoteStore, changed
from qkit.storage.store import hash_file, read_bytes, read_file


class Bucket:
    """Objects in memory, by name in the bucket; fail(method, name, n): raises what the n-th call is to meet."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str]] = {}
        self.fail: Callable[[str, str, int], None] = lambda method, name, n: None
        self.calls: list[tuple[str, str]] = []
        self.fetched = self.writes = 0
        self.lock = threading.Lock()

    def at(self, prefix: str) -> Memory:
        return Memory(self, prefix)

    def below(self, prefix: str) -> dict[str, bytes]:
        return {n[len(prefix) + 1 :]: data for n, (data, _) in self.files.items() if n.startswith(prefix + "/")}


class Memory:
    """`remote.Objects` of a `Bucket`."""

    def __init__(self, bucket: Bucket, prefix: str):
        self.bucket, self.prefix, self.label = bucket, prefix, f"s3://bucket/{prefix}"

    def _call(self, method: str, name: str) -> str:
        with self.bucket.lock:
            n = len(self.bucket.calls)
            self.bucket.calls.append((method, name))
        self.bucket.fail(method, name, n)
        return f"{self.prefix}/{name}"

    def list(self, folder: str, deep: bool = False) -> list[Found]:
        inside = self._call("list", folder) if folder else self._call("list", "").rstrip("/")
        below = [n for n in self.bucket.files if n.startswith(inside + "/")]
        return [self._found(n) for n in below if deep or "/" not in n[len(inside) + 1 :]]

    def _found(self, name: str) -> Found:
        data, tag = self.bucket.files[name]
        return Found(name[len(self.prefix) + 1 :], len(data), tag)

    def find(self, name: str) -> Found | None:
        full = self._call("find", name)
        return self._found(full) if full in self.bucket.files else None

    def get(self, found: Found, start: int, end: int) -> bytes:
        full = self._call("get", found.name)
        data, tag = self.bucket.files.get(full, (b"", ""))
        if tag != found.tag:
            raise changed(f"{self.label}/{found.name}")
        with self.bucket.lock:
            self.bucket.fetched += end - start
        return data[start:end]

    def _store(self, full: str, data: bytes) -> str:
        with self.bucket.lock:
            self.bucket.writes += 1
            tag = f"tag-{self.bucket.writes}"
            self.bucket.files[full] = (bytes(data), tag)
        return tag

    def put(self, name: str, data: bytes | bytearray) -> None:
        self._store(self._call("put", name), bytes(data))

    def put_if(self, name: str, data: bytes, tag: str | None) -> str | None:
        full = self._call("put_if", name)
        if (self.bucket.files[full][1] if full in self.bucket.files else None) != tag:
            return None
        done = self._store(full, data)
        self.bucket.fail("answer", name, len(self.bucket.calls))
        return done

    def upload(self, name: str, parts: Iterator[bytearray], part_bytes: int) -> None:
        full = self._call("upload", name)
        whole = list(parts)
        assert all(len(part) == part_bytes for part in whole[:-1]) and whole[-1]
        self._store(full, b"".join(whole))

    def delete(self, name: str) -> None:
        self.bucket.files.pop(self._call("delete", name), None)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """What s3://bucket/... means in this test; waits take no time."""
    made = Bucket()
    monkeypatch.setattr(object_store, "open_objects", lambda place: made.at(place.prefix))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    return made


def put(bucket: Bucket, prefix: str, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.at(prefix).put(str(path.relative_to(folder)), path.read_bytes())


def breaking(times: int, *methods: str) -> Callable[[str, str, int], None]:
    """Calls of these methods fail that often, each time as the first of them begins, then once works."""
    count = 0

    def fail(method: str, name: str, n: int) -> None:
        nonlocal count
        if method in methods:
            count += 1
            if count % (times + 1):
                raise Passing("the line broke")

    return fail


def test_reads_of_any_size(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RANGE", 1000)
    data = bytes(torch.randint(0, 256, (12_345,), dtype=torch.uint8).numpy())
    bucket.at("p").put("x", data)
    reader = RemoteStore(bucket.at("p")).open("x")
    bucket.fail = breaking(2, "get")
    for start, length in ((0, 12_345), (1, 1000), (999, 1001), (12_344, 1), (5, 0)):
        assert read_bytes(reader, start, length) == data[start : start + length]
    with pytest.raises(QkitError, match="changed"):
        read_bytes(reader, 12_000, 346)
    assert hash_file(RemoteStore(bucket.at("p")), "x").sha256 == hashlib.sha256(data).hexdigest()


def test_tries_are_bounded_and_said(bucket: Bucket) -> None:
    bucket.at("p").put("x", b"abc")
    reader = RemoteStore(bucket.at("p")).open("x")

    def gone(method: str, name: str, n: int) -> None:
        raise Passing("the server answered 503 SlowDown")

    bucket.fail = gone
    before = len(bucket.calls)
    with pytest.raises(QkitError) as caught:
        read_bytes(reader)
    said = f"cannot read s3://bucket/p/x: the server answered 503 SlowDown ({remote.ATTEMPTS} tries)"
    assert caught.value.message == said and "same command" in (caught.value.hint or "")
    assert len(bucket.calls) - before == remote.ATTEMPTS


def test_waits_grow_and_follow_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)

    def do() -> None:
        raise Passing("busy", after=40.0 if len(waits) == 3 else None)

    with pytest.raises(QkitError):
        remote.persist("read it", do)
    assert len(waits) == remote.ATTEMPTS - 1 and waits[3] == 40.0
    others = waits[:3] + waits[4:]
    assert others[0] <= 0.2 and max(others) <= 15 and 20 < sum(others) < 70


def test_short_answers_are_no_data(bucket: Bucket) -> None:
    bucket.at("p").put("x", b"abcdef")
    objects = bucket.at("p")
    whole, answers = objects.get, [b"abc", b"", b"abcdefg"]
    objects.get = lambda *given: answers.pop() if answers else whole(*given)  # type: ignore[method-assign]
    assert read_bytes(RemoteStore(objects).open("x")) == b"abcdef" and not answers


def test_a_change_under_way_is_an_error(bucket: Bucket, tmp_path: Path) -> None:
    put(bucket, "m", make_model(tmp_path / "m"))
    source = open_source("s3://bucket/m")
    name = source.names()[0]
    source.read(name)
    bucket.at("m").put("model.safetensors", bucket.below("m")["model.safetensors"])
    with pytest.raises(QkitError, match=r"s3://bucket/m/model.safetensors changed while it was being read"):
        source.read(name)


def test_what_is_written_in_parts(bucket: Bucket) -> None:
    store, reused = RemoteStore(bucket.at("p"), part_bytes=1000), bytearray(700)

    def chunks(count: int, fail: bool = False) -> Iterator[memoryview]:
        for i in range(count):
            reused[:] = bytes([i]) * 700  # a chunk may be reused once the next is asked for
            yield memoryview(reused)
        if fail:
            raise KeyError("of the caller's")

    for count in (0, 1, 10):
        expected = b"".join(bytes([i]) * 700 for i in range(count))
        written = store.write("x", chunks(count))
        assert read_file(store, "x") == expected
        assert (written.sha256, written.nbytes) == (hashlib.sha256(expected).hexdigest(), len(expected))
    assert [method for method, name in bucket.calls if method in ("put", "upload")] == ["put", "put", "upload"]
    for count in (1, 10):
        with pytest.raises(KeyError):
            store.write("y", chunks(count, fail=True))
    assert not store.has("y")


@pytest.mark.parametrize("largest", [0, 1 << 30, 150 << 30, 3 << 40])
def test_parts_are_few_enough(largest: int) -> None:
    part = remote.part_bytes(largest)
    assert part >= 5 << 20 and largest // part < remote.MAX_PARTS and part % (1 << 20) == 0


@pytest.mark.parametrize("wrong", ["s3://", "s3:///x", "s3://b/a//c", "s3://b/../x", "s3://b/x?y", "ftp://b/x"])
def test_names_that_are_no_place(wrong: str) -> None:
    with pytest.raises(QkitError) as caught:
        parse_place(wrong)
    assert "s3://bucket/prefix" in (caught.value.hint or "")
    assert parse_place("S3://my.bucket/a/b/") == Place("s3", "my.bucket", "a/b")


def test_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(QkitError, match="obstore, which is not installed") as caught:
        open_source("s3://bucket/m")
    assert "pip install 'qkit-llm[remote]'" in (caught.value.hint or "")


# --- the lock


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "LEASE", 0.2)


def test_one_at_a_time(bucket: Bucket, quick: None) -> None:
    said: list[str] = []
    first = Lease(bucket.at("p"), said.append)
    with pytest.raises(QkitError, match=r"another qkit convert is writing s3://bucket/p \(process \d+ on "):
        Lease(bucket.at("p"), said.append)
    assert len(said) == 1 and "waiting" in said[0]
    first.check()
    first.release()
    assert bucket.below("p") == {}
    Lease(bucket.at("p"), said.append).release()
    assert len(said) == 1


def test_a_lock_that_nobody_holds_is_taken_over(bucket: Bucket, quick: None) -> None:
    left = Lease(bucket.at("p"), print)
    left._stop.set()  # as if killed
    left._thread.join()
    after = Lease(bucket.at("p"), print)
    left._stop.clear()
    left._beat()  # it lived after all, and sees that it has lost
    with pytest.raises(QkitError, match="another run took over"):
        left.check()
    left.release()
    after.check()
    assert LOCK in bucket.below("p")
    after.release()
    assert bucket.below("p") == {}


def test_a_lost_answer_is_no_other_run(bucket: Bucket, quick: None) -> None:
    answers = iter([True, False])

    def fail(method: str, name: str, n: int) -> None:
        if method == "answer" and next(answers, False):
            raise Passing("the answer was lost")

    bucket.fail = fail
    Lease(bucket.at("p"), lambda said: pytest.fail("waits for itself")).release()


# --- conversions


OPTIONS: dict[str, Any] = {"method": "rtn", "device": "cpu"}
OUT = "s3://bucket/out"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a model of several shards, what is made of it here)."""
    folder = tmp_path_factory.mktemp("remote")
    source = make_model(folder / "m", max_shard_size="300KB")
    qkit.convert(str(source), folder / "out", **OPTIONS)
    return source, folder / "out"


def assert_same(bucket: Bucket, folder: Path) -> None:
    assert bucket.below("out") == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_there_and_back(bucket: Bucket, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, local = folders
    put(bucket, "m", source)
    here, there = open_source(str(source)), open_source("s3://bucket/m")
    assert here.fingerprint == there.fingerprint and here.base_model == there.base_model
    bucket.fetched = 0
    qkit.convert("s3://bucket/m", OUT, dry_run=True, **OPTIONS)
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in source.glob("*.safetensors"))
    small = sum((source / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))
    assert bucket.fetched == headers + small and bucket.below("out") == {}
    monkeypatch.setattr(remote, "RANGE", 10_000)
    bucket.fail = breaking(1, "get", "put", "find", "list")
    result = qkit.convert("s3://bucket/m", OUT, **OPTIONS)
    assert_same(bucket, local)
    assert str(result.out) == OUT and result.as_dict()["plan"]["disk_free_bytes"] is None
    assert qkit.convert("s3://bucket/m", OUT, **OPTIONS).already_done
    assert inspect(OUT, verify=True).problems == []
    qkit.load(OUT, device="cpu")


def test_the_order_in_which_it_becomes_a_model(bucket: Bucket, folders: tuple[Path, Path]) -> None:
    qkit.convert(str(folders[0]), OUT, **OPTIONS)
    written = [name for method, name in bucket.calls if method in ("put", "upload")]
    assert written[-3:] == ["config.json", "model.safetensors.index.json", MANIFEST]
    assert written[0] == MANIFEST and "config.json" not in written[:-3]
    assert LOCK not in bucket.below("out")


def test_gguf(bucket: Bucket, folders: tuple[Path, Path], tmp_path: Path) -> None:
    qkit.convert(str(folders[0]), tmp_path / "local", format="gguf", **OPTIONS)
    qkit.convert(str(folders[0]), OUT, format="gguf", **OPTIONS)
    assert_same(bucket, tmp_path / "local")
    file = next(name for name in bucket.below("out") if name.endswith(".gguf"))
    local = open_source(str(tmp_path / "local"))
    for spec in (OUT, f"{OUT}/{file}"):
        source = open_source(spec)
        assert (source.label, source.fingerprint) == (spec, local.fingerprint)
        assert inspect(spec, verify=True).problems == []


class Killed(BaseException):
    """As a process ends that nobody asked."""


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_killed_and_continued(
    bucket: Bucket,
    folders: tuple[Path, Path],
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    options: dict[str, Any] = {"method": method, "device": "cpu"}
    options |= {"calib_samples": 2, "calib_len": 32} if method == "gptq" else {}
    qkit.convert(str(folders[0]), tmp_path / "local", **options)
    monkeypatch.setattr(Lease, "release", lambda self: (self._stop.set(), self._thread.join()))  # its lock stays
    steps = len([1 for p in (tmp_path / "local").iterdir()])

    def kill(method: str, name: str, n: int) -> None:
        if method in ("put", "upload") and name.endswith((".safetensors", "config.json", ".index.json")):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

    resumed = False
    for step in range(steps):
        left = step
        bucket.fail = kill
        try:
            resumed |= qkit.convert(str(folders[0]), OUT, **options).resumed
        except Killed:
            with pytest.raises(QkitError, match="unfinished conversion"):
                open_source(OUT)
            assert not Manifest.load(RemoteStore(bucket.at("out"))).complete
        bucket.fail = lambda method, name, n: None
    bucket.files.pop(f"out/{LOCK}", None)
    assert_same(bucket, tmp_path / "local")
    assert resumed


def test_damage_in_an_interrupted_run_is_found(bucket: Bucket, folders: tuple[Path, Path]) -> None:
    def kill(method: str, name: str, n: int) -> None:
        if method == "put" and name == "config.json":
            raise KeyboardInterrupt

    bucket.fail = kill
    with pytest.raises(KeyboardInterrupt):
        qkit.convert(str(folders[0]), OUT, **OPTIONS)
    assert LOCK not in bucket.below("out")
    bucket.fail = lambda method, name, n: None
    name = next(name for name in bucket.below("out") if name.endswith(".safetensors"))
    bucket.at("out").put(name, b"damaged")
    assert qkit.convert(str(folders[0]), OUT, **OPTIONS).resumed
    assert_same(bucket, folders[1])


def test_nothing_of_others_is_touched(bucket: Bucket, folders: tuple[Path, Path]) -> None:
    source = str(folders[0])
    bucket.at("out").put("notes.txt", b"mine")
    for restart in (False, True):
        with pytest.raises(QkitError, match=r"holds 'notes.txt', which qkit did not write"):
            qkit.convert(source, OUT, restart=restart, **OPTIONS)
    assert bucket.below("out") == {"notes.txt": b"mine"}
    bucket.files.clear()
    qkit.convert(source, OUT, **OPTIONS)
    before = dict(bucket.files)
    with pytest.raises(QkitError, match="holds another conversion") as caught:
        qkit.convert(source, OUT, scheme="w8a16", **OPTIONS)
    assert "--restart" in (caught.value.hint or "") and bucket.files == before
    bucket.at("out").put("sub/notes.txt", b"mine")
    with pytest.raises(QkitError, match=r"holds 'sub/notes\.txt'"):
        qkit.convert(source, OUT, scheme="w8a16", restart=True, **OPTIONS)
    assert {k: v for k, v in bucket.files.items() if k != "out/sub/notes.txt"} == before


def test_restart(bucket: Bucket, folders: tuple[Path, Path]) -> None:
    qkit.convert(str(folders[0]), OUT, format="gguf", **OPTIONS)
    qkit.convert(str(folders[0]), OUT, restart=True, **OPTIONS)
    assert_same(bucket, folders[1])


def test_two_runs(bucket: Bucket, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused, and the first goes on."""
    monkeypatch.setattr(lease, "BEAT", 0.02)
    refused: list[QkitError | None] = []

    def second(method: str, name: str, n: int) -> None:
        if name.endswith(".safetensors") and method == "put" and not refused:
            refused.append(None)
            with pytest.raises(QkitError, match="another qkit convert is writing") as caught:
                qkit.convert(str(folders[0]), OUT, **OPTIONS)
            refused[0] = caught.value

    bucket.fail = second
    qkit.convert(str(folders[0]), OUT, **OPTIONS)
    assert refused[0] is not None and "wait for it" in (refused[0].hint or "")
    assert_same(bucket, folders[1])


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("s3://bucket/m", "s3://bucket/m", "one inside the other"),
        ("s3://bucket/m", "s3://bucket/m/q", "one inside the other"),
        ("s3://bucket/m/q", "s3://bucket/m", "one inside the other"),
        ("demo", "s3://bucket", "a whole bucket"),
        ("demo", "hf://org/name", "does not write to hf://"),
        ("demo", "https://host/x", "does not write to https://"),
    ],
)
def test_places_that_no_result_goes_to(source: str, out: str, message: str) -> None:
    with pytest.raises(QkitError, match=message) as caught:
        remote_workspace.resolve_remote(out, [source, None])
    assert caught.value.hint


def test_nothing_there(bucket: Bucket) -> None:
    with pytest.raises(QkitError, match="there is nothing at s3://bucket/absent"):
        open_source("s3://bucket/absent")
    bucket.at("m").put(MANIFEST, json.dumps({"schema": 1}).encode())
    with pytest.raises(QkitError, match="not a valid manifest"):
        open_source("s3://bucket/m")
