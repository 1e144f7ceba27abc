"""A conversion spread over workers gives the bytes of one machine's. The real Ray is in tests/interop/test_ray.py."""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from models import with_nan
from pools import GIB, Elsewhere, Here, Use
from results import QUICK, contents

import qkit
from qkit.conversion import cluster, executor, pool, ray_pool
from qkit.conversion.options import Options
from qkit.conversion.plan import make_plan
from qkit.conversion.pool import Node, Refused
from qkit.conversion.run import convert
from qkit.conversion.workspace import partial_dir
from qkit.errors import QkitError
from qkit.hardware.detect import LocalDevice
from qkit.sources import open_source
from qkit.storage.local import LocalStore

SMALL = {"method": "rtn", "shard_size": 100_000}


def test_files_in_any_order_by_processes_of_which_one_dies(llama: Path, tmp_path: Path, use: Use) -> None:
    pool = use(Elsewhere())
    spread = convert(str(llama), tmp_path / "a" / "out", ray="auto", **SMALL)
    alone = convert(str(llama), tmp_path / "b" / "out", **SMALL)
    assert contents(spread.out) == contents(alone.out)
    assert pool.deaths == 1 and len(pool.sent) == len(spread.plan.shards) > 3
    assert sorted(path.name for path in spread.out.parent.iterdir()) == ["out"]
    assert max(map(len, pool.sent)) < 4000


@pytest.mark.parametrize(
    "options",
    [
        {"format": "gptq", **SMALL},
        {"format": "awq", **SMALL},
        {"format": "bnb", "shard_size": 100_000},
        {"kv_cache": "fp8", **SMALL, **QUICK},
        {"method": "rtn"},
        {"format": "gguf", "method": "rtn"},
        {"format": "gguf", "method": "imatrix", **QUICK},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_every_way_gives_the_bytes_of_one_machine(llama: Path, tmp_path: Path, use: Use, options: dict) -> None:
    pool = use(Here())
    spread = convert(str(llama), tmp_path / "a" / "out", ray="auto", **options)
    alone = convert(str(llama), tmp_path / "b" / "out", **options)
    assert contents(spread.out) == contents(alone.out)
    files = len(spread.plan.shards)
    assert len(pool.sent) == (files if files > 1 else len([t for t in spread.plan.tasks if t.scheme]))
    assert len(pool.done) == len(pool.sent)


def test_a_quantized_source_is_repacked_by_workers(llama: Path, tmp_path: Path, use: Use) -> None:
    convert(str(llama), tmp_path / "gptq", format="gptq", method="rtn", group_size=64)
    use(Here())
    for name, ray in (("a", "auto"), ("b", None)):
        convert(str(tmp_path / "gptq"), tmp_path / name / "out", ray=ray, shard_size=100_000)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_a_run_that_is_interrupted_goes_on_alone(llama: Path, tmp_path: Path, use: Use, monkeypatch) -> None:
    pool = use(Here())
    call, out = pool.call, tmp_path / "a" / "out"

    def interrupted(sent: bytes) -> bytes:
        if len(pool.done) == 2:
            (partial_dir(out) / ".model-00001.abcd.qkit-tmp").touch()  # a worker's
            raise KeyboardInterrupt
        return call(sent)

    pool.call = interrupted
    with pytest.raises(KeyboardInterrupt):
        convert(str(llama), out, ray="auto", **SMALL)
    assert len(pool.done) == 2 and not list(partial_dir(out).glob("*qkit-tmp"))
    monkeypatch.setattr(cluster, "_SEEN", 0.0)
    for sent in pool.sent:  # what was not begun writes nothing when its turn comes
        assert isinstance(pickle.loads(call(sent)), Refused)
    assert convert(str(llama), out, **SMALL).resumed
    convert(str(llama), tmp_path / "b" / "out", **SMALL)
    assert contents(out) == contents(tmp_path / "b" / "out")


@pytest.mark.parametrize("options", [SMALL, {"format": "gguf", "method": "rtn"}])
def test_what_a_worker_refuses_ends_the_run(llama: Path, tmp_path: Path, use: Use, options: dict) -> None:
    source = with_nan(llama, tmp_path / "source", "model.layers.1.mlp.up_proj.weight", (3, 5))
    use(Here())
    with pytest.raises(QkitError, match=r"layers\.1\.mlp\.up_proj\.weight.*(NaN|infinite)"):
        convert(str(source), tmp_path / "out", ray="auto", **options)
    assert not (tmp_path / "out").exists()


def job(source: Path, out: Path) -> tuple[pool.Job, LocalStore]:
    options = Options(method="rtn", shard_size=100_000)
    out.mkdir()
    return pool.job_of(str(source), options, make_plan(open_source(str(source)), out / "x", options)), LocalStore(out)


def refusal(job: pool.Job, store: LocalStore) -> Refused:
    pool._made.cache_clear()
    answer = cluster.write_file(job, store, "model-00001-of-00001.safetensors", 1)
    assert isinstance(answer, Refused) and answer.hint
    assert not list(store.folder.iterdir())
    return answer


def test_a_worker_that_does_not_agree_writes_nothing(llama: Path, tmp_path: Path, monkeypatch) -> None:
    sent, store = job(llama, tmp_path / "out")
    changes = {
        "version": ("9.9", f"qkit is {qkit.__version__}, and 9.9 where the run began"),
        "fingerprint": ("0" * 64, "is another checkpoint than where the run began"),
        "plan": ("0" * 64, "the same options give another plan"),
        "source": ("/not/here", "there is no '/not/here' here"),
        "token": (str(tmp_path / "out" / "token"), f"does not see {tmp_path / 'out'}"),
    }
    monkeypatch.setattr(cluster, "_SEEN", 0.0)
    for name, (value, message) in changes.items():
        assert message in refusal(replace(sent, **{name: value}), store).message
    assert "on a file system that" in refusal(replace(sent, source="/not/here"), store).hint


def test_a_worker_sees_the_files_that_the_user_named_from_here(llama: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "rules.yaml").write_text('[{modules: "*.down_proj", scheme: w8a16}]')
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(llama)
    options = Options(method="rtn", recipe="rules.yaml", ray="auto", skip=("*.up_proj",))
    sent = pool.job_of("model", options, make_plan(open_source("model"), tmp_path / "out", replace(options, ray=None)))
    assert sent.source == str(tmp_path / "model") and sent.options.recipe == str(tmp_path / "rules.yaml")
    monkeypatch.chdir("/")
    assert pool.digest_of(pool.plan_of(sent)) == sent.plan


def test_a_file_that_only_the_worker_sees(llama: Path, tmp_path: Path, use: Use, monkeypatch) -> None:
    pool = use(Here())
    call, out = pool.call, tmp_path / "out"

    def lost(sent: bytes) -> bytes:
        answer = call(sent)
        for file in partial_dir(out).glob("model-*"):
            file.unlink()
        return answer

    pool.call = lost
    monkeypatch.setattr(cluster, "_SEEN", 0.0)
    with pytest.raises(QkitError, match=r"a worker wrote model-.*, and it is not in"):
        convert(str(llama), out, ray="auto", **SMALL)


def test_what_a_task_asks_for(llama: Path, tmp_path: Path, use: Use) -> None:
    pool = use(Here((Node(8, 8 * GIB), Node(6, 8 * GIB))))
    convert(str(llama), tmp_path / "out", ray="auto", **SMALL)
    cpus, memory = pool.asked[0]
    assert cpus == 14 // len(pool.sent) > 1 and 400 << 20 < memory < GIB
    for nodes, message in (((Node(4, 100 << 20),), "a worker needs .* of memory"), ((Node(0, GIB),), "offers a core")):
        use(Here(nodes))
        with pytest.raises(QkitError, match=message):
            convert(str(llama), tmp_path / "other", ray="auto", **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ray": "somewhere", "method": "rtn"}, "'somewhere' is not a Ray cluster"),
        ({"ray": "ray://host:port", "method": "rtn"}, "is not a Ray cluster"),
        ({"ray": ":6379", "method": "rtn"}, "is not a Ray cluster"),
        ({"format": "gguf", "method": "rtn", "shard_size": "1MB"}, "--shard-size does not apply"),
    ],
)
def test_refused_before_work(llama: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(QkitError, match=message):
        convert(str(llama), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_cluster_calibrates_on_processors(llama: Path, tmp_path: Path, monkeypatch) -> None:
    gpu = LocalDevice("cuda:0", "Toy", 16 << 30, 16 << 30, None, (), None)
    monkeypatch.setattr("qkit.conversion.plan.resolve", lambda name: gpu)
    with pytest.raises(QkitError, match="--ray calibrates on processors, not on cuda"):
        convert(str(llama), tmp_path / "out", ray="auto", method="gptq", device="cuda")


def test_without_ray(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(executor, "find_spec", lambda name: None)
    with pytest.raises(QkitError, match="not installed") as error:
        convert(str(llama), tmp_path / "out", ray="auto", method="rtn", dry_run=True)
    assert error.value.hint == "pip install 'qkit-llm[ray]'"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "timed out"),
        (b"HTTP/1.1 400 Bad Request\r\n", "something else answers there"),
        (b"", "something else answers there"),
        (b"\0\0\x12\x04\0\0\0\0\0" + bytes(18), None),
    ],
)
def test_what_answers_at_an_address(monkeypatch, said: bytes | None, message: str | None) -> None:
    """Of Ray's servers the first frame of HTTP/2; of what is silent, or another server, an error before Ray tries."""
    monkeypatch.setattr(ray_pool, "_REACH", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                if said is None:
                    connection.recv(1024)  # until the other side gives up
                else:
                    connection.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(QkitError, match=message) if message else contextlib.nullcontext():
            ray_pool._reach(f"ray://{address}")
        thread.join()
    with pytest.raises(QkitError, match=r"no Ray cluster at 127\.0\.0\.1:.*refused"):
        ray_pool._reach(address)


def test_smaller_files(llama: Path, tmp_path: Path) -> None:
    plan = convert(str(llama), tmp_path / "out", **SMALL).plan
    assert len(plan.shards) > 3 and all(s.bytes_out <= 100_000 or len(s.tasks) == 1 for s in plan.shards)
    assert (tmp_path / "out" / plan.shards[-1].file).exists()
    with pytest.raises(QkitError, match="holds another conversion"):
        convert(str(llama), tmp_path / "out", method="rtn")
