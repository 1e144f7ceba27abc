"""tokenizer.json and its companions, rebuilt from a GGUF file's vocabulary.

Two kinds of vocabulary: "gpt2", byte-level BPE with merges, and "llama", SentencePiece BPE, whose merges follow from
the scores. The pre-tokenizers are those of the models' own tokenizer.json; their names are llama.cpp's
(`llm_load_vocab` in src/llama-vocab.cpp). Everything is plain data in the format of the `tokenizers` package, so the
same file gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import QkitError
from ..types import Sidecar

# enum llama_token_type
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS = "gpt2", "digits"  # GPT-2's own expression, and with every digit split off before
_PRE = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
# These look a whole word up before they merge; and, in files without the flag, they begin with BOS.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken", "pixtral")
_MODELS = ("gpt2", "llama")


# What a file that is written calls each of them: a name that llama.cpp has had since it had the split.
_NAMES = {_GPT2: "gpt-2", _DIGITS: "smollm", _LLAMA3: "llama-bpe", _QWEN2: "qwen2", _TEKKEN: "tekken"}


def pre_tokenizer_name(given: Any) -> str | None:
    """llama.cpp's name of a tokenizer.json's byte-level `pre_tokenizer`; None for one that is not known here."""
    if not isinstance(given, Mapping):
        return None
    parts: Any = given.get("pretokenizers") if given.get("type") == "Sequence" else [given]
    kinds = [part.get("type") for part in parts or ()]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    if parts[-1].get("use_regex", True):
        digits = kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits")
        return _NAMES[_DIGITS] if digits else _NAMES[_GPT2] if kinds == ["ByteLevel"] else None
    pattern = (parts[0].get("pattern") or {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    return _NAMES.get(pattern) if isinstance(pattern, str) else None


def check(metadata: Mapping[str, Any], arch: str, vocab_size: int, path: object) -> None:
    """Raises QkitError where `build` could not rebuild the tokenizer; reads no string array."""
    model = metadata.get("tokenizer.ggml.model")
    if model not in _MODELS:
        raise QkitError(
            f"{path}: the tokenizer model {str(model)[:40]!r} is not supported", f"supported: {', '.join(_MODELS)}"
        )
    tokens = _sized(metadata, "tokens", path)
    if not 0 < tokens <= vocab_size:
        raise QkitError(f"{path}: {tokens} tokens in the vocabulary, {vocab_size} rows in the embedding")
    for name in ("token_type", "scores"):
        needed = model == "llama" or name == "token_type"
        if needed or f"tokenizer.ggml.{name}" in metadata:
            count = _sized(metadata, name, path)
            if count != tokens:
                raise QkitError(f"{path}: tokenizer.ggml.{name} has {count} values for {tokens} tokens")
    if model == "gpt2":
        _sized(metadata, "merges", path)
        pre = _pre(metadata, arch)
        if pre not in _PRE:
            raise QkitError(
                f"{path}: the pre-tokenizer {str(pre)[:40]!r} is not supported", f"supported: {', '.join(_PRE)}"
            )
    for key in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        # 2**32 - 1 is llama.cpp's "none"
        if token is not None and (type(token) is not int or not (0 <= token < tokens or token == 0xFFFFFFFF)):
            raise QkitError(f"{path}: tokenizer.ggml.{key}_token_id is {str(token)[:40]}, not one of {tokens} tokens")


def _sized(metadata: Mapping[str, Any], name: str, path: object) -> int:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None or isinstance(value, str) or not hasattr(value, "__len__"):
        raise QkitError(f"{path}: metadata tokenizer.ggml.{name} is missing or not an array")
    return len(value)


def _pre(metadata: Mapping[str, Any], arch: str) -> Any:
    # Files from before the key existed: Qwen's split is known from the architecture.
    fallback = "qwen2" if arch.startswith("qwen") else "default"
    return metadata.get("tokenizer.ggml.pre", fallback)


def build(metadata: Mapping[str, Any], config: Mapping[str, Any], path: object) -> tuple[Sidecar, ...]:
    """The tokenizer's files, the chat template and generation_config.json; deterministic.

    metadata has passed `check`. Raises QkitError where a token is not text or appears twice.
    """
    vocabulary = Vocabulary(metadata, path)
    files = {
        "generation_config.json": _generation_config(metadata, config),
        "special_tokens_map.json": vocabulary.special,
        "tokenizer.json": vocabulary.tokenizer(str(metadata["general.architecture"])),
        "tokenizer_config.json": vocabulary.config(config["max_position_embeddings"]),
    }
    sidecars = [Sidecar(name, _json(value, compact=name == "tokenizer.json")) for name, value in files.items()]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        sidecars.append(Sidecar("chat_template.jinja", template.encode()))
    return tuple(sorted(sidecars, key=lambda sidecar: sidecar.name))


def _json(value: Any, compact: bool) -> bytes:
    # Indented, a vocabulary of 262k tokens and its merges would take a minute of everybody's time to load.
    text = json.dumps(value, ensure_ascii=False, indent=None if compact else 2)
    return (text + "\n").encode()


def _generation_config(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids to begin, pad and stop with: every end the file names (of text, turn, message) stops."""
    result: dict[str, Any] = {k: config[k] for k in ("bos_token_id", "pad_token_id") if k in config}
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(end for end in ends if type(end) is int and end < config["vocab_size"]))
    if stops:
        result["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return result


class Vocabulary:
    """Tokens, their types and the special ones among them."""

    def __init__(self, metadata: Mapping[str, Any], path: object):
        self.metadata, self.path = metadata, path
        self.byte_level = metadata["tokenizer.ggml.model"] == "gpt2"
        try:
            self.tokens = list(metadata["tokenizer.ggml.tokens"])
        except ValueError as error:
            raise QkitError(f"{path}: a token of the vocabulary is not UTF-8: {error}") from error
        self.types = metadata["tokenizer.ggml.token_type"]
        self.pre = _pre(metadata, str(metadata["general.architecture"]))
        default = not self.byte_level or self.pre in _WHOLE_WORDS
        self.special = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if token is not None and token < len(self.tokens):
                self.special[f"{name}_token"] = self.tokens[token]
        self.add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default)) and "bos_token" in self.special
        self.add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in self.special

    def config(self, max_length: int) -> dict[str, Any]:
        """tokenizer_config.json: the generic class, which takes tokenizer.json as it is."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special,
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
        }

    def tokenizer(self, arch: str) -> dict[str, Any]:
        """tokenizer.json."""
        parts = self._byte_level() if self.byte_level else self._sentencepiece(arch.startswith("gemma"))
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(parts["model"]["vocab"]),
            "normalizer": parts["normalizer"],
            "pre_tokenizer": parts["pre_tokenizer"],
            "post_processor": self._post_processor(),
            "decoder": parts["decoder"],
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                **parts["model"],
            },
        }

    def _added(self, vocab: Mapping[str, int]) -> list[dict[str, Any]]:
        """Tokens matched whole in the text before anything else: control ones, special, and user-defined ones."""
        named = set(self.special.values())
        return [
            {
                "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": kind == CONTROL or token in named,
            }
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if (kind in (CONTROL, USER) or token in named) and vocab.get(token) == i
        ]  # fmt: skip

    def _post_processor(self) -> dict[str, Any] | None:
        """BOS and EOS around each sequence, as the file asks for."""
        if not (self.add_bos or self.add_eos):
            return None
        bos = self.special["bos_token"] if self.add_bos else None
        eos = self.special["eos_token"] if self.add_eos else None

        def wrapped(name: str, type_id: int) -> list[dict[str, Any]]:
            pieces = [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos else []
            pieces.append({"Sequence": {"id": name, "type_id": type_id}})
            return pieces + ([{"SpecialToken": {"id": eos, "type_id": type_id}}] if eos else [])

        special = {t: {"id": t, "ids": [self.tokens.index(t)], "tokens": [t]} for t in (bos, eos) if t}
        return {
            "type": "TemplateProcessing",
            "single": wrapped("A", 0),
            "pair": wrapped("A", 0) + wrapped("B", 1),
            "special_tokens": special,
        }

    def _vocab(self, tokens: list[str]) -> dict[str, int]:
        vocab = {token: i for i, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            double = next(token for i, token in enumerate(tokens) if vocab[token] != i)
            raise QkitError(f"{self.path}: the token {double!r} appears twice in the vocabulary")
        return vocab

    def _byte_level(self) -> dict[str, Any]:
        vocab = self._vocab(self.tokens)
        try:
            merges = list(self.metadata["tokenizer.ggml.merges"])
        except ValueError as error:
            raise QkitError(f"{self.path}: a merge is not UTF-8: {error}") from error
        for merge in merges:
            left, space, right = merge.partition(" ")
            if not space or left not in vocab or right not in vocab or left + right not in vocab:
                raise QkitError(f"{self.path}: the merge {merge!r} does not join two tokens into a third")
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = _PRE[self.pre]
        first: list[dict[str, Any]] = []
        if split in (_GPT2, _DIGITS):
            byte_level["use_regex"] = True
            first = [{"type": "Digits", "individual_digits": True}] if split == _DIGITS else []
        else:
            first = [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}]
        return {
            "normalizer": {"type": "NFC"} if split == _QWEN2 else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, byte_level]} if first else byte_level,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"ignore_merges": self.pre in _WHOLE_WORDS, "vocab": vocab, "merges": merges},
        }

    def _sentencepiece(self, gemma: bool) -> dict[str, Any]:
        tokens = self.tokens
        if gemma:
            # Runs of spaces are stored as such; text reaches the model with the spaces replaced.
            tokens = [t.replace(" ", "\u2581") if t and not t.strip(" ") else t for t in tokens]
        prefix = bool(self.metadata.get("tokenizer.ggml.add_space_prefix", not gemma))
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        prepend = {"type": "Prepend", "prepend": "\u2581"}
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        vocab = self._vocab(tokens)
        unknown = self.special.get("unk_token") or next(
            (t for t, kind in zip(tokens, self.types, strict=True) if kind == UNKNOWN), None
        )
        return {
            "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if prefix else replace,
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "unk_token": unknown,
                "fuse_unk": True,
                "byte_fallback": "<0x00>" in vocab,
                "vocab": vocab,
                "merges": self._derive_merges(tokens, vocab, gemma),
            },
        }

    def _derive_merges(self, tokens: list[str], vocab: dict[str, int], gemma: bool) -> list[str]:
        """Every way to join two tokens into a third, "left right", best first.

        SentencePiece merges by score, the higher the earlier. Gemma's spaces and newlines are user-defined and
        have no useful score, but its order of tokens is the order of merges. Within a token the longer
        left part comes first, as in the conversion that transformers does.
        """
        if gemma:
            order = list(range(len(tokens)))
        else:
            scores = self.metadata["tokenizer.ggml.scores"]
            order = sorted(range(len(tokens)), key=lambda i: -scores[i])
        joined = [tokens[i] for i in order if self.types[i] in (NORMAL, USER)]
        # A token with a real space in it is out of reach: text arrives with its spaces replaced.
        return [
            f"{left} {right}"
            for token in joined
            if " " not in token
            for cut in range(len(token) - 1, 0, -1)
            if (left := token[:cut]) in vocab and (right := token[cut:]) in vocab
        ]
