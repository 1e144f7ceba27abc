"""The engines that a sweep can run in: what each needs, and which models it takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import QkitError

ADAPTERS = Path(__file__).parent / "adapters"
_VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"


@dataclass(frozen=True)
class Engine:
    """package   what pip calls it; None: qkit itself, which runs in this Python
    adapter   the file that drives it (see sweep_worker.py)
    place     the user's name of a model -> what the engine is given; QkitError where it does not run that
    whole     whether a prompt goes through the model at once, so that its activations grow with its length"""

    name: str
    package: str | None
    extra: str
    adapter: str
    place: Callable[[str], str]
    whole: bool


def _any(model: str) -> str:
    return model


def _gguf(model: str) -> str:
    """The GGUF file that a name means."""
    from ...sources.demo import demo_path

    if model == "demo":
        return str(demo_path())
    path = Path(model)
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return str(found[0].resolve())
    elif path.suffix == ".gguf" and path.is_file():
        return str(path.resolve())
    raise QkitError(
        f"llama.cpp runs GGUF files, and {model} is none, nor a folder with one",
        f"make one with: qkit convert {model} -o OUT --format gguf",
    )


def _safetensors(model: str) -> str:
    """A folder of safetensors, or a Hub id."""
    path = Path(model)
    if model == "demo" or path.suffix == ".gguf" or (path.is_dir() and not any(path.glob("*.safetensors"))):
        hint = f"make one with: qkit convert {model} -o OUT"
        raise QkitError(f"vLLM runs folders of safetensors, and {model} is none", hint)
    return str(path.resolve()) if path.is_dir() else model


ENGINES = (
    Engine("qkit", None, "", "run_qkit.py", _any, whole=True),
    Engine("vllm", "vllm", "vllm", "run_vllm.py", _safetensors, whole=False),
    Engine("llama.cpp", "llama-cpp-python", "gguf", "run_llamacpp.py", _gguf, whole=False),
)


def get(name: str) -> Engine:
    """The engine of that name; QkitError that lists them for any other."""
    for engine in ENGINES:
        if engine.name == name:
            return engine
    raise QkitError(f"there is no engine {name!r}", "the engines are " + ", ".join(e.name for e in ENGINES))


def python_with(engine: Engine, python: str | None) -> str:
    """The Python that has the engine: `python`, by default this one. Raises QkitError where it has none."""
    if engine.package is None:
        if python is not None:
            raise QkitError("the engine qkit runs in this Python", "leave out --engine-python")
        return sys.executable
    found = sys.executable if python is None else shutil.which(python)
    remedy = f"pip install {engine.package} in an environment of its own, and name its Python with --engine-python"
    if found is None:
        raise QkitError(f"there is no Python {python}", remedy)
    # The CPU build of vLLM is a package of another name.
    for package in (engine.package, f"{engine.package}-cpu"):
        done = subprocess.run([found, "-c", _VERSION, package], capture_output=True, check=False)
        if done.returncode == 0:
            return found
    raise QkitError(f"{engine.package} is not installed for {found}", remedy)
