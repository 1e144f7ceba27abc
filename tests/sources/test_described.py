"""Configs and headers alone; of the Hub through its real client, from a server that counts what is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qkit.errors import QkitError
from qkit.sources import open_source
from qkit.sources.described import describe_source


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(64, 4096) for i in range(4)}  # 4 MiB
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 4}))
    return folder


def test_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    for spec in (tmp_path, tmp_path / "config.json"):
        source = describe_source(str(spec))
        assert (source.names(), source.config["hidden_size"]) == ([], 64)
    (tmp_path / "other.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert describe_source(str(tmp_path / "other.json")).config["architectures"]


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"a": 1}', "\x00", '"text"'])
def test_no_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(QkitError) as caught:
        describe_source(str(tmp_path))
    assert caught.value.hint


def test_weights_that_lie_here(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    described, opened = describe_source(str(folder)), open_source(str(folder))
    assert described.names() == opened.names() and described.names()


SHA = "0123456789012345678901234567890123456789"


class _Hub(BaseHTTPRequestHandler):
    """The Hub's file endpoint for one repository, org/name."""

    folder: Path
    sent: list[int]

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        if self.path.startswith("/api/models/org/name"):
            data = json.dumps({"id": "org/name", "sha": SHA, "siblings": []}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        prefix = f"/org/name/resolve/{SHA}/"
        file = self.folder / self.path.removeprefix(prefix).partition("?")[0]
        if not self.path.startswith(prefix) or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith(prefix) else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = file.read_bytes(), 200
        whole = len(data)
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if body else whole))
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if body:
            self.sent.append(len(data))
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, list[int]]]:
    folder = make_folder(tmp_path / "served")
    sent: list[int] = []
    handler = type("Hub", (_Hub,), {"folder": folder, "sent": sent})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, sent
    server.shutdown()
    server.server_close()


SHOW = """
import sys
if sys.argv[1] == "offline":
    import socket
    def refuse(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    socket.getaddrinfo = refuse
    del sys.argv[1]
from qkit.sources.described import describe_source
from qkit.errors import QkitError
for spec in sys.argv[1:]:
    try:
        source = describe_source(spec)
        print(source.base_model, len(source.names()), sum(source.meta(n).nbytes for n in source.names()))
    except QkitError as error:
        print("error:", error)
"""


def _shown(endpoint: str, home: Path, *specs: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SHOW, *specs], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_hub_is_asked_for_headers_alone(hub: tuple[str, Path, list[int]], tmp_path: Path) -> None:
    endpoint, folder, sent = hub
    opened = open_source(str(folder))
    expected = f"org/name {len(opened.names())} {opened.stored.nbytes}"
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    lines = _shown(endpoint, tmp_path / "home", "org/name", "org/absent")
    assert lines[0] == expected
    assert lines[1].startswith("error: no model 'org/absent'")
    assert len(sent) == 2 and sum(sent) <= max(100_001, header + 8) + (folder / "config.json").stat().st_size


def test_without_a_network(tmp_path: Path) -> None:
    """One clear answer at once; a cached copy is opened."""
    cache = tmp_path / "hub" / "models--org--cached"
    make_folder(cache / "snapshots" / SHA)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(SHA)
    lines = _shown("https://huggingface.co", tmp_path, "offline", "org/name", "org/cached")
    assert "cannot reach the Hub for org/name" in lines[0]
    assert lines[-1].startswith("org/cached 4 ")
