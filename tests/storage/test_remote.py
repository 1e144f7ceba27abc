"""Objects as files, whatever library fetches them: tries, pins, ranges, parts; and the lock."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from buckets import Bucket, breaking, put
from models import make_model

from qkit.errors import QkitError
from qkit.sources import open_source
from qkit.storage import remote
from qkit.storage.lease import LOCK, Lease
from qkit.storage.places import Place, parse_place
from qkit.storage.remote import Passing, RemoteStore
from qkit.storage.store import hash_file, read_bytes, read_file


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
