"""hf:// and the dry run of a Hub id, against a server that answers as the Hub does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import Fault, Proxy
from hub_server import HubServer
from models import make_model

import qkit
from qkit.errors import QkitError
from qkit.sources import open_source
from qkit.sources.hub_files import _seconds
from qkit.storage import remote
from qkit.storage.places import HubPlace, parse_hub


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("hub") / "m", max_shard_size="500KB", vocab_size=2048)
    (folder / "pytorch_model.bin").write_bytes(bytes(1 << 20))  # what qkit never fetches
    (folder / "original").mkdir()
    (folder / "original" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    server = HubServer(model)
    yield server
    server.close()


def converted(
    hub: HubServer, home: Path, *arguments: str, token: str | None = None
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "qkit", "convert", *arguments, "--method", "rtn", "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def weights_in(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".incomplete") or p.stat().st_size > 1 << 18]


def headers(model: Path) -> int:
    return sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in model.glob("*.safetensors"))


def test_a_plan_takes_headers_alone(hub: HubServer, model: Path, tmp_path: Path) -> None:
    counted = Proxy(hub.own)
    hub.storage = counted.url
    spec = "org/name"
    done = converted(hub, tmp_path / "home", spec, "-o", str(tmp_path / "out"), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["bytes_in"] > 1 << 20 and plan["source"] == spec
    assert counted.sent(".safetensors") == headers(model)
    config = sum((model / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))
    assert counted.sent() == headers(model) + config
    assert weights_in(tmp_path) == [] and not (tmp_path / "out").exists()
    counted.close()


def schedule(n: int, method: str, path: str) -> Fault | None:
    spoilt = {
        1: Fault(drop=0.5),
        4: Fault(short=0.7),
        6: Fault(status=503),
        9: Fault(status=429),
        11: Fault(refuse=True),
    }
    return spoilt.get(n % 13)


def test_no_copy_and_the_same_bytes(hub: HubServer, model: Path, tmp_path: Path) -> None:
    """Through a line that breaks, is throttled and cuts answers short, with a token that the storage must not see."""
    proxy = Proxy(hub.own, schedule)
    hub.storage = proxy.url
    clean = tmp_path / "clean"
    clean.mkdir()
    for path in model.iterdir():  # a copy of what qkit takes
        if path.is_file() and path.suffix != ".bin":
            shutil.copy(path, clean)
    qkit.convert(str(clean), tmp_path / "local", method="rtn", device="cpu")
    done = converted(hub, tmp_path / "home", "hf://org/name", "-o", str(tmp_path / "out"), token="hf_secret")
    assert done.returncode == 0, done.stderr
    assert weights_in(tmp_path / "home") == []
    assert not any(seen.path.endswith(".bin") or "original" in seen.path for seen in proxy.seen)
    assert len({seen.path for seen in proxy.seen}) < len(hub.asked) + 13 < len(proxy.seen)  # addresses are used again
    for path in sorted((tmp_path / "local").iterdir()):
        ours, theirs = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        if path.name == "qkit_manifest.json":  # but for the name, which a folder's config does not say
            ours = ours.replace(b'"base_model": "llama model"', b'"base_model": "org/name"')
        if path.name != "README.md" and path.name != "qkit_manifest.json":
            assert ours == theirs, path.name
    mine, manifest = (json.loads((tmp_path / n / "qkit_manifest.json").read_text()) for n in ("local", "out"))
    assert mine["identity"]["source"]["fingerprint"] == manifest["identity"]["source"]["fingerprint"]
    assert mine["tensors"] == manifest["tensors"] and mine["sources"] == manifest["sources"]
    proxy.close()


@pytest.fixture
def asked_here(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The client of this process asks the server too."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    return hub


@pytest.mark.parametrize(
    ("spec", "gated", "message"),
    [
        ("hf://org/absent", False, "no model 'org/absent'"),
        ("hf://org/name@v9", False, "no revision 'v9'"),
        ("hf://org/name", True, "gated"),
        ("hf://org/name/config.json", False, "one file of a model"),
        ("hf://org", False, "not a model on the Hub"),
    ],
)
def test_refusals(asked_here: HubServer, spec: str, gated: bool, message: str) -> None:
    asked_here.gated = gated
    with pytest.raises(QkitError, match=message) as caught:
        open_source(spec)
    assert caught.value.hint


@pytest.mark.parametrize("spec", ["hf://org/name", "org/name"])
def test_no_weights_that_qkit_reads(asked_here: HubServer, tmp_path: Path, spec: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "m-Q4_0.gguf").write_bytes(b"")
    asked_here.folder = tmp_path
    with pytest.raises(QkitError, match="org/name has no safetensors weights on the Hub") as caught:
        open_source(spec, ranged=True)
    assert "hf://org/name/FILE.gguf" in (caught.value.hint or "") and "pickle" in (caught.value.hint or "")


def test_a_storage_that_is_gone(asked_here: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that says what and how often, after a bounded number of tries."""
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    proxy = Proxy(asked_here.own, lambda n, method, path: Fault(status=503))
    asked_here.storage = proxy.url
    with pytest.raises(
        QkitError, match=rf"cannot read hf://org/name/\S+: the Hub answered 503 .{remote.ATTEMPTS} tries"
    ):
        open_source("hf://org/name")
    proxy.close()


def test_what_a_name_means() -> None:
    assert parse_hub("hf://org/name") == HubPlace("org/name", None, None)
    assert parse_hub("hf://org/name@v1.0/x/m-Q4.gguf") == HubPlace("org/name", "v1.0", "x/m-Q4.gguf")
    for wrong in ("hf://", "hf://org", "hf://org/na me", "hf://org/../x", "hf:///a/b"):
        with pytest.raises(QkitError):
            parse_hub(wrong)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [({"Retry-After": "7"}, 7.0), ({"RateLimit": '"api";r=0;t=55'}, 55.0), ({}, None), ({"Retry-After": "soon"}, None)],
)
def test_how_long_a_server_wants_to_be_left_alone(given: dict[str, str], seconds: float | None) -> None:
    assert _seconds(given) == seconds
