"""The tokenizer that travels with a checkpoint: its code is never run unasked, and tokenizer.json serves without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import make_model

from qkit.errors import QkitError
from qkit.runtime import load_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer is a class of its own; importing its module leaves a mark."""
    folder = make_model(tmp_path / "custom")
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast): ...\n"
    )
    given = json.loads((folder / "tokenizer_config.json").read_text())
    own = "own.OwnTokenizer"
    given |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [own, own]},
              "chat_template": TEMPLATE}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder


def test_tokenizer_json_serves_where_the_class_is_code(custom: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(custom)
    assert not (tmp_path / "ran").exists()
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[x]"


@pytest.mark.parametrize("content", ["{", "{}", None])
def test_without_a_usable_one_it_is_refused_and_nothing_runs(custom: Path, tmp_path: Path, content: str | None) -> None:
    (custom / "tokenizer.json").unlink()
    if content is not None:
        (custom / "tokenizer.json").write_text(content)
    with pytest.raises(QkitError, match="tokenizer"):
        load_tokenizer(custom)
    assert not (tmp_path / "ran").exists()


def test_its_code_runs_where_the_user_says_so(custom: Path, tmp_path: Path) -> None:
    assert type(load_tokenizer(custom, trust_remote_code=True)).__name__ == "OwnTokenizer"
    assert (tmp_path / "ran").exists()
