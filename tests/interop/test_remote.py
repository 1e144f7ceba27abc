"""Sources and results in a real S3 server (moto's), through a line that breaks, is throttled and cuts answers short."""

from __future__ import annotations

import hashlib
import http.client
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from fault_proxy import Fault, Proxy
from interop import clients
from models import make_model

import qkit
from qkit.errors import QkitError
from qkit.inspection import inspect
from qkit.sources import open_source
from qkit.storage import lease, remote
from qkit.storage.places import parse_place
from qkit.storage.remote import RemoteStore
from qkit.storage.store import hash_file

METHODS = {
    "rtn": {"method": "rtn", "device": "cpu"},
    "gptq": {"method": "gptq", "calib_samples": 4, "calib_len": 64, "device": "cpu"},
}
SIGNED = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class Server:
    """A running server, asked without any library: what is in it is seen from outside."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        there = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        there.request(method, path, body, {"Authorization": SIGNED})
        answer = there.getresponse()
        data = answer.read()
        there.close()
        assert answer.status < 300, (method, path, answer.status, data[:500])
        return data

    def put(self, prefix: str, folder: Path) -> None:
        for path in folder.iterdir():
            self.ask("PUT", f"/bucket/{prefix}/{path.name}", path.read_bytes())

    def names(self, prefix: str) -> list[str]:
        found = ElementTree.fromstring(self.ask("GET", f"/bucket?list-type=2&prefix={prefix}/"))
        return [key.text[len(prefix) + 1 :] for key in found.findall(".//{*}Key") if key.text]

    def uploads(self) -> int:
        """Uploads in parts that were begun and not ended, invisible as they are."""
        return len(list(ElementTree.fromstring(self.ask("GET", "/bucket?uploads")).findall(".//{*}Upload")))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    python = clients.once(clients.python_of)("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path_factory.mktemp("moto") / "log", "w")  # noqa: SIM115
    running = subprocess.Popen(
        [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=subprocess.STDOUT
    )
    found = Server(f"http://127.0.0.1:{port}")
    try:
        for _ in range(300):
            try:
                found.ask("PUT", "/bucket")
                break
            except OSError:
                time.sleep(0.2)
        yield found
    finally:
        running.terminate()
        running.wait()
        log.close()


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    sys.path.append(str(clients.once(clients.alone)(clients.OBSTORE)))
    importlib.invalidate_caches()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    made = Proxy(server.url)
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in environment(made).items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


def environment(proxy: Proxy) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_REGION": "us-east-1",
    }


@pytest.fixture(scope="module")
def folders(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Path]]:
    """(a model of several files, what each method makes of it here); the model is at s3://bucket/m as well."""
    folder = tmp_path_factory.mktemp("models")
    source = make_model(folder / "m", max_shard_size="4MB", vocab_size=16_384, num_hidden_layers=4)
    server.put("m", source)
    made = {name: folder / name for name in METHODS}
    for name, out in made.items():
        qkit.convert(str(source), out, **METHODS[name])
    return source, made


def assert_same(server: Server, prefix: str, folder: Path) -> None:
    assert sorted(server.names(prefix)) == sorted(p.name for p in folder.iterdir())
    for path in folder.iterdir():
        assert server.ask("GET", f"/bucket/{prefix}/{path.name}") == path.read_bytes(), path.name


def spoilt(n: int, method: str, path: str) -> Fault | None:
    """Six of thirteen requests go wrong, each in another way."""
    return {
        1: Fault(drop=0.5),
        3: Fault(short=0.6),
        5: Fault(status=503),
        7: Fault(status=429),
        9: Fault(refuse=True),
        11: Fault(lost=method in ("PUT", "DELETE"), delay=0.05),
    }.get(n % 13)


QKIT = "import sys; from qkit.storage import lease; lease.LEASE = 3.0; lease.BEAT = 0.5; lease._POLL = 0.2;"
MAIN = "from qkit.cli import main; sys.exit(main(sys.argv[1:]))"


def command(proxy: Proxy, home: Path, *arguments: str, code: str = "") -> subprocess.Popen[str]:
    """qkit in a process of its own that can write no file of more than a mebibyte."""
    home.mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | environment(proxy)
    env |= {"TMPDIR": str(home), "HF_HOME": str(home)}
    env["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(clients.alone(clients.OBSTORE)), os.environ.get("PYTHONPATH")])
    )
    return subprocess.Popen(
        [sys.executable, "-c", QKIT + code + MAIN, *arguments], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )  # fmt: skip


def arguments(method: str) -> list[str]:
    more = [["--" + k.replace("_", "-"), str(v)] for k, v in METHODS[method].items()]
    return [word for pair in more for word in pair]


def test_a_plan_takes_headers_alone(proxy: Proxy, folders: tuple[Path, Mapping[str, Path]]) -> None:
    source, _ = folders
    plan = qkit.convert("s3://bucket/m", "s3://bucket/planned", dry_run=True, **METHODS["rtn"]).plan
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in source.glob("*.safetensors"))
    assert len(plan.shards) >= 1 and proxy.sent(".safetensors") == headers < 8000
    assert {seen.method for seen in proxy.seen} == {"GET"}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_and_nothing_on_disk(
    server: Server, proxy: Proxy, folders: tuple[Path, Mapping[str, Path]], tmp_path: Path, method: str
) -> None:
    proxy.faults = spoilt
    out = f"faulty-{method}"
    done = command(proxy, tmp_path / "home", "convert", "s3://bucket/m", "-o", f"s3://bucket/{out}", *arguments(method))
    said = done.communicate(timeout=600)
    assert done.returncode == 0, said[1]
    proxy.faults = lambda n, method, path: None
    assert_same(server, out, folders[1][method])
    assert {seen.status for seen in proxy.seen} >= {200, 206, 429, 503}
    assert sum(p.stat().st_size for p in (tmp_path / "home").rglob("*") if p.is_file()) < 1 << 20
    assert inspect(f"s3://bucket/{out}", verify=True).problems == []
    assert qkit.convert("s3://bucket/m", f"s3://bucket/{out}", **METHODS[method]).already_done


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_continued(
    server: Server, proxy: Proxy, folders: tuple[Path, Mapping[str, Path]], tmp_path: Path, method: str
) -> None:
    """Killed as a file of weights is on its way, twice; the lock it leaves is waited for."""
    out = f"killed-{method}"
    line = ["convert", "s3://bucket/m", "-o", f"s3://bucket/{out}", *arguments(method)]
    for round_ in range(2):
        running = command(proxy, tmp_path / "home", *line)
        asked = 0

        def kill(n: int, verb: str, path: str, running=running, last=round_) -> Fault | None:
            nonlocal asked
            if verb == "PUT" and ".safetensors" in path:
                asked += 1
                if asked > last:
                    running.send_signal(signal.SIGKILL)
                    return Fault(refuse=True)
            return None

        proxy.faults = kill
        running.communicate(timeout=600)
        assert running.returncode == -signal.SIGKILL
        with pytest.raises(QkitError, match="unfinished conversion"):
            open_source(f"s3://bucket/{out}")
    proxy.faults = lambda n, method, path: None
    done = command(proxy, tmp_path / "home", *line)
    said = done.communicate(timeout=600)
    assert done.returncode == 0, said[1]
    assert "waiting 3 seconds" in said[1]
    assert_same(server, out, folders[1][method])


def test_two_at_once(server: Server, proxy: Proxy, folders: tuple[Path, Mapping[str, Path]], tmp_path: Path) -> None:
    line = ["convert", "s3://bucket/m", "-o", "s3://bucket/twice", *arguments("rtn")]
    proxy.faults = lambda n, method, path: Fault(delay=6.0) if method == "PUT" and ".safetensors" in path else None
    both = [command(proxy, tmp_path / str(i), *line) for i in range(2)]
    said = [each.communicate(timeout=600)[1] for each in both]
    assert sorted(each.returncode for each in both) == [0, 2], said
    refused = said[0 if both[0].returncode else 1]
    assert "another qkit convert is writing s3://bucket/twice" in refused and "hint: wait for it" in refused
    assert_same(server, "twice", folders[1]["rtn"])


def test_a_source_that_changes(server: Server, proxy: Proxy, folders: tuple[Path, Mapping[str, Path]]) -> None:
    source = folders[0]
    server.put("changing", source)
    name = sorted(p.name for p in source.glob("*.safetensors"))[-1]
    opened = open_source("s3://bucket/changing")
    data = bytearray((source / name).read_bytes())
    data[-1] ^= 1
    server.ask("PUT", f"/bucket/changing/{name}", bytes(data))
    with pytest.raises(QkitError, match=f"s3://bucket/changing/{name} changed while it was being read"):
        for tensor in opened.names():
            opened.read(tensor)
    server.ask("DELETE", f"/bucket/changing/{name}")
    with pytest.raises(QkitError, match="changed while it was being read"):
        for tensor in opened.names():
            opened.read(tensor)


@pytest.mark.parametrize("fault", [None, Fault(status=503), Fault(refuse=True), Fault(lost=True)])
def test_large_objects_go_in_parts(server: Server, proxy: Proxy, fault: Fault | None) -> None:
    from qkit.storage.object_store import open_objects

    proxy.faults = lambda n, method, path: fault if n % 3 == 1 else None
    store = RemoteStore(open_objects(parse_place("s3://bucket/large")), part_bytes=5 << 20)
    chunk = bytearray(3 << 20)

    def chunks(count: int, fail: bool = False) -> Iterator[memoryview]:
        for i in range(count):
            chunk[:8] = i.to_bytes(8, "little")
            yield memoryview(chunk)
        if fail:
            raise KeyError("of the caller's")

    expected = hashlib.sha256(b"".join(bytes(c) for c in chunks(9)))
    written = store.write("whole", chunks(9))
    assert (written.sha256, written.nbytes) == (expected.hexdigest(), 27 << 20)
    assert hash_file(store, "whole") == written
    with pytest.raises(KeyError):
        store.write("half", chunks(9, fail=True))
    assert server.names("large") == ["whole"] and server.uploads() == 0


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        (Fault(status=403, code="AccessDenied"), "denies access to s3://bucket/m", "policy"),
        (Fault(status=403, code="InvalidAccessKeyId"), "does not take these credentials", "AWS_ACCESS_KEY_ID"),
        (Fault(status=400, code="ExpiredToken"), "does not take these credentials", "AWS_ACCESS_KEY_ID"),
        (Fault(status=301, code="PermanentRedirect"), "in another region", "AWS_REGION"),
        (Fault(status=400, code="AuthorizationHeaderMalformed"), "in another region", "AWS_REGION"),
        (Fault(status=503), rf"answered 503 SlowDown \({remote.ATTEMPTS_AT_FIRST} tries\)", "check the network"),
        (Fault(refuse=True), rf"the connection failed \({remote.ATTEMPTS_AT_FIRST} tries\)", "check the network"),
    ],
)
def test_refusals(
    proxy: Proxy, folders: tuple[Path, Mapping[str, Path]], fault: Fault, message: str, hint: str
) -> None:
    proxy.faults = lambda n, method, path: fault
    with pytest.raises(QkitError, match=message) as caught:
        open_source("s3://bucket/m")
    assert hint in (caught.value.hint or "") and "\n" not in caught.value.message


def test_what_is_not_there(proxy: Proxy, tmp_path: Path) -> None:
    for spec, message in (("s3://no-such/m", "there is no bucket 'no-such'"), ("s3://bucket/none", "nothing at")):
        with pytest.raises(QkitError, match=message):
            open_source(spec)
    with pytest.raises(QkitError, match="there is no bucket 'no-such'"):
        qkit.convert(str(make_model(tmp_path / "m")), "s3://no-such/m", **METHODS["rtn"])


def test_no_credentials(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(QkitError, match="no credentials for S3") as caught:
        open_source("s3://bucket/m")
    assert "AWS_PROFILE" in (caught.value.hint or "")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(QkitError, match="needs the package boto3") as caught:
        open_source("s3://bucket/m")
    assert "pip install boto3" in (caught.value.hint or "")


def as_google(proxy: Proxy) -> None:
    """S3's server as Google's XML interface: generations for ETags, tokens for signatures."""
    tags: dict[str, str] = {}

    def request(path: str, headers: dict[str, str]) -> str:
        headers["authorization" if "authorization" in headers else "Authorization"] = SIGNED
        wanted = headers.pop("x-goog-if-generation-match", None)
        if wanted == "0":
            headers["If-None-Match"] = "*"
        elif wanted:
            headers["If-Match"] = tags[wanted]
        place, mark, query = path.partition("?")
        return unquote(place) + mark + query

    def response(headers: dict[str, str]) -> None:
        tag = headers.get("ETag")
        if tag:
            generation = str(int(hashlib.sha256(tag.encode()).hexdigest()[:15], 16) + 1)
            tags[generation] = tag
            headers["x-goog-generation"] = generation

    proxy.request, proxy.response = request, response


def test_google(
    server: Server, proxy: Proxy, folders: tuple[Path, Mapping[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_google(proxy)
    key = {"gcs_base_url": proxy.url, "disable_oauth": True, "client_email": "", "private_key": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps({**key, "private_key_id": ""}))
    monkeypatch.setenv("GOOGLE_BASE_URL", proxy.url)
    monkeypatch.setattr(lease, "BEAT", 0.2)
    proxy.faults = lambda n, method, path: Fault(status=503) if n % 7 == 3 else None
    qkit.convert("gs://bucket/m", "gs://bucket/google", **METHODS["rtn"])
    assert_same(server, "google", folders[1]["rtn"])
    assert inspect("gs://bucket/google").tensors


def test_gguf(server: Server, proxy: Proxy, folders: tuple[Path, Mapping[str, Path]], tmp_path: Path) -> None:
    local = qkit.convert(str(folders[0]), tmp_path / "g", format="gguf", **METHODS["rtn"])
    qkit.convert("s3://bucket/m", "s3://bucket/gguf", format="gguf", **METHODS["rtn"])
    assert_same(server, "gguf", tmp_path / "g")
    file = local.plan.shards[0].file
    assert open_source(f"s3://bucket/gguf/{file}").fingerprint == open_source(str(tmp_path / "g" / file)).fingerprint
