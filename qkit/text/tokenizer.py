"""The tokenizer of a checkpoint, as transformers has it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..untrusted import parse_json

if TYPE_CHECKING:
    from ..sources.types import Source


_HELD = 15  # bytes that a tokenizer takes for each of its tokenizer.json


def held(source: Source) -> int:
    """About the bytes of memory that the tokenizer of a checkpoint takes."""
    return _HELD * sum(s.nbytes for s in source.sidecars if s.name == "tokenizer.json")


def load_tokenizer(source: str | os.PathLike[str] | Source, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer that travels with a checkpoint. Raises QkitError where there is none.

    Code in the checkpoint is run only where `trust_remote_code` says so, and nobody is asked; without it a tokenizer
    of a custom class is read from its tokenizer.json."""
    from transformers import AutoTokenizer

    from ..sources import open_source

    opened = open_source(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else source
    # From a folder of its own, whatever the source is: nothing is fetched, weights are not looked at.
    with tempfile.TemporaryDirectory(prefix="qkit-tokenizer-") as folder:
        for sidecar in opened.sidecars:
            path = Path(folder, sidecar.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sidecar.read())
        plain = {k: v for k, v in opened.config.items() if k != "quantization_config"}
        Path(folder, "config.json").write_text(json.dumps(plain))
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:  # the tokenizers library raises bare ones, transformers whatever a value leads to
            if not trust_remote_code and Path(folder, "tokenizer.json").is_file():
                plain_tokenizer = _from_json(Path(folder))
                if plain_tokenizer is not None:
                    return plain_tokenizer
            reason = next(iter(str(error).replace(folder, opened.label).splitlines()), type(error).__name__)
            if "trust_remote_code" in str(error):
                raise QkitError(
                    f"the tokenizer of {opened.label} is code inside the checkpoint, which qkit does not run",
                    "add a tokenizer.json to it, or use --trust-remote-code if you trust its author",
                ) from error
            raise QkitError(
                f"no usable tokenizer in {opened.label}: {reason}", "copy the tokenizer files of the base model into it"
            ) from error


def _from_json(folder: Path) -> Any:
    """The tokenizer of tokenizer.json, with the special tokens of tokenizer_config.json; None where it is no use."""
    from transformers import PreTrainedTokenizerFast

    named: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        try:
            given = parse_json(path.read_bytes())
        except ValueError:
            given = {}
        given = given if isinstance(given, dict) else {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = given.get(key)
            value = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(value, str):
                named[key] = value
        if isinstance(given.get("chat_template"), str):
            named["chat_template"] = given["chat_template"]
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    except Exception:  # the tokenizers library raises bare Exception for a file it cannot read
        return None
