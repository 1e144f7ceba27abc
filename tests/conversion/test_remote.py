"""Results in an object store, sources too: the same bytes, whole or recognizably not, and nothing of others touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from buckets import Bucket, breaking, put
from models import make_model

import qkit
from qkit.conversion import remote_workspace
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.sources import open_source
from qkit.storage import lease, remote
from qkit.storage.lease import LOCK, Lease
from qkit.storage.manifest import MANIFEST, Manifest
from qkit.storage.remote import RemoteStore

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
