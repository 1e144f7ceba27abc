from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from buckets import Bucket

# Triton decides on its first import, for the whole process, whether kernels are compiled or run in its interpreter on
# CPU tensors. Tests that compile (tests/kernels/triton/test_static.py) do so in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # `from models import make_model` in any test folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--speed-figures",
        default=os.environ.get("QKIT_SPEED_FIGURES"),
        metavar="FILE",
        help="published tokens/s, which are no part of the project: what benchmarks/speed_fit.py takes",
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint; tests only read it."""
    from models import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """What s3://bucket/... means in this test; waits take no time."""
    from buckets import Bucket

    from qkit.storage import object_store, remote

    made = Bucket()
    monkeypatch.setattr(object_store, "open_objects", lambda place: made.at(place.prefix))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of which nothing is heard for a fifth of a second counts as left behind."""
    from qkit.storage import lease

    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "LEASE", 0.2)
