"""A tokenizer of bytes, for checkpoints with random weights."""

from __future__ import annotations

import json
from pathlib import Path


def write_tokenizer(folder: Path, vocabulary: int = 0) -> None:
    """vocabulary: how many words there are to be, of which those beyond the bytes occur in no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {c: i for i, c in enumerate(alphabet)} | {f"<unused{i}>": i for i in range(len(alphabet), vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
