from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `from models import make_model` in any test folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint; tests only read it."""
    from models import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")
