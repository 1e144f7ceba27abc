"""Sweeps in the real engines, and load on real servers: llama.cpp's and vLLM's, on this CPU."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from interop import clients
from models import make_model

from qkit.measure import measure_endpoint
from qkit.measure.endpoint import run as load_test
from qkit.measure.engines import table
from qkit.measure.engines.sweep import sweep
from qkit.measure.engines.types import Point, Sweep
from qkit.sources.demo import demo_path
from qkit.text.defaults import evaluation_text
from qkit.text.tokenizer import load_tokenizer

TOKENS = list(range(2, 250))
POINTS = (Point(1, 32, 32, 8), Point(2, 32, 32, 8), Point(1, 128, 128, 8))
QUICK = {"context": 32, "max_tokens": 8, "timeout": 120.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(make_model(tmp_path_factory.mktemp("engines") / "tiny"))


def python_of(name: str) -> str:
    return str(clients.once(clients.python_of)(name))


@contextlib.contextmanager
def serving(client: str, arguments: list[str], folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """(URL, process) of a server of that client's environment, ready; it is killed in the end."""
    python = python_of(client)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QKIT_", "TRITON_", "VIRTUAL_ENV"))}
    env |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache"), **clients.CLIENTS[client].env}
    command = [python, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/v1"
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=5):
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"{command} ended:\n{(folder / 'log').read_text()[-4000:]}")
                time.sleep(0.5)
            yield url, process
        finally:
            kill(process)


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def check(found: Sweep, version: str) -> None:
    assert found.problem is None and found.engine_version.startswith(version), found
    assert len(found.measured) == len(POINTS), [p.skipped for p in found.points]
    for point in found.measured:
        assert point.repeats == len(point.ttft) == 2 and point.warmups == 1
        # vLLM may start a batch's sequences in different steps: those in which all get a token are fewer.
        assert point.generated - 2 <= len(point.tpot) / point.repeats <= point.generated - 1
        assert point.ttft_p50 > 0 and point.tpot_p50 > 0 and point.peak_bytes > 10 << 20


def test_a_sweep_in_llama_cpp() -> None:
    found = sweep("demo", "llama.cpp", POINTS, TOKENS, python=python_of("llamacpp"), repeats=2)
    check(found, "llama-cpp-python ")
    assert found.settings["n_ubatch"] > 0 and all(point.generate_tps is None for point in found.measured)


def test_the_steps_in_llama_cpp_are_those_of_its_own_generate(tmp_path) -> None:
    """Three sequences at once give, token by token, what each gives alone: positions and sequences are right."""
    ids = load_tokenizer("demo")(evaluation_text().content[:2000], add_special_tokens=False).input_ids
    prompts = [ids[100 * row : 100 * row + 40] for row in range(3)]  # sense, so that no two tokens are as likely
    adapter = str(table.ADAPTERS / "run_llamacpp.py")
    job = {"adapter": adapter, "model": str(demo_path()), "prompts": prompts, "generated": 6}
    printed = clients.run("llamacpp", job, tmp_path, script="client_llamacpp_steps.py")
    answer = json.loads(printed.splitlines()[-1])
    assert answer["adapter"] == answer["llama"] and len(answer["steps"]) == 5


def test_a_sweep_in_vllm(tiny) -> None:
    arguments = {"enforce_eager": True}
    found = sweep(
        tiny, "vllm", POINTS, TOKENS, python=python_of("vllm"), repeats=2, cache_bytes=1 << 20, arguments=arguments
    )
    check(found, "vllm ")
    assert all(len(point.generate) == 2 and point.generate_tps > 0 for point in found.measured)
    assert found.settings["device"] == "cpu" and found.settings["max_num_seqs"] == 2


def test_llama_cpp_s_server_and_then_its_death(tmp_path, monkeypatch) -> None:
    """It says no usage in a stream, and computes one request at a time: more of them wait for their first token.
    Killed under load, it leaves what was measured before; the rest is failures, by reason, and the test ends."""
    arguments = ["-m", "llama_cpp.server", "--model", str(demo_path()), "--model_alias", "smol", "--n_ctx", "512"]
    arguments += ["--n_threads", "2", "--interrupt_requests", "False"]
    real, sent = load_test.send, []
    with serving("llamacpp", arguments, tmp_path) as (url, process):
        found = measure_endpoint(url, concurrency=(1, 4), **QUICK)

        def send(*given):
            sent.append(given)
            if len(sent) == 8 + 4:  # another request is under way on the other connection
                kill(process)
            return real(*given)

        monkeypatch.setattr(load_test, "send", send)
        dying = measure_endpoint(url, concurrency=(1, 2, 4, 8), **QUICK)
    assert found.problem is None and found.model == "smol" and found.counted == "chunks"
    alone, four = found.levels
    assert alone.succeeded == four.succeeded == 8 and alone.failed == four.failed == ()
    assert alone.output_tokens == four.output_tokens == 64  # min_tokens holds
    assert "as the server counted" in found.prompt_basis
    assert four.ttft.p50 > alone.ttft.p50

    whole, half, none = dying.levels
    assert whole.succeeded == 8 and whole.failed == ()
    reasons = {f.reason for f in half.failed}
    assert 1 <= half.succeeded < 8 and half.requests == 8 and "connection refused" in reasons
    # What was under way ends in one of three ways, by where the kill met it; what follows is refused.
    assert reasons <= {"connection refused", "no connection", "stream cut short", "connection closed without an answer"}
    assert none.succeeded == 0 and [(f.reason, f.count) for f in none.failed] == [("connection refused", 8)]
    assert dying.unmeasured == (8,) and not dying.passed


def test_vllm_s_server(tiny, tmp_path) -> None:
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", tiny, "--served-model-name", "org/tiny"]
    arguments += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8", "--dtype", "bfloat16"]
    with serving("vllm", arguments, tmp_path) as (url, _):
        found = measure_endpoint(url, concurrency=(1, 8), **QUICK)
        with pytest.raises(Exception, match=r"HTTP 400.*256") as caught:
            measure_endpoint(url, concurrency=(1,), context=4000, max_tokens=8)
    assert "--context" in caught.value.hint
    assert found.problem is None and found.model == "org/tiny" and found.counted == "usage" and found.ignore_eos
    for level in found.levels:
        assert level.failed == () and level.output_tokens == 8 * level.succeeded and level.ended_early == 0
        assert abs(level.prompt_tokens / level.succeeded - 32) <= 8
    assert [level.succeeded for level in found.levels] == [8, 16]
