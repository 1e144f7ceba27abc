"""A tokenizer.json as `tokenizer.ggml.*` keys (llama.cpp, src/llama-vocab.cpp); the inverse: sources/gguf/tokenizer.py.

Two kinds: byte-level BPE, "gpt2", and SentencePiece-like BPE, "llama", whose merges llama.cpp finds by scores: of two
neighbours it joins those whose whole has the highest. A score that falls with the place of the first merge that makes
a token gives the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import QkitError
from ...sources.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, pre_tokenizer_name
from ...sources.types import Source
from ...storage.gguf import Typed
from ...untrusted import parse_json

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NEVER = -1e9  # the score of what no merge makes
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


class Vocabulary:
    """The tokenizer of a source. Raises QkitError where it has none that llama.cpp could run.

    size: tokens that it has; the file may list more, so that every row of the embedding has one."""

    def __init__(self, source: Source):
        self.label = source.label
        self._files = files = {sidecar.name: sidecar for sidecar in source.sidecars}
        self.settings = self._object(files, "tokenizer_config.json") if "tokenizer_config.json" in files else {}
        self.templates = {name: self._text(files, name) for name in _TEMPLATES if name in files}
        self.text = self._text(files, "tokenizer.json") if "tokenizer.json" in files else _from_transformers(source)
        self.given = self._parsed("tokenizer.json", self.text)
        model = self.given.get("model")
        model = model if isinstance(model, dict) else {}
        if model.get("type") not in ("BPE", None) or not isinstance(model.get("vocab"), dict):
            raise QkitError(
                f"{self.label}: a tokenizer of type {model.get('type')!r} is not written to GGUF files", "written: BPE"
            )
        self.tokenizer = self._checked()
        self.model = model
        self.added = {token["id"]: token for token in self.given.get("added_tokens") or []}
        self.tokens = {index: token for token, index in model["vocab"].items()}
        self.tokens |= {index: token["content"] for index, token in self.added.items()}
        self.size = max(self.tokens, default=-1) + 1
        self.byte_level = _mentions(self.given.get("pre_tokenizer"), "ByteLevel") or _mentions(
            self.given.get("decoder"), "ByteLevel"
        )
        if self.byte_level:
            self.pre = pre_tokenizer_name(self.given.get("pre_tokenizer"))
            if self.pre is None:
                raise QkitError(
                    f"{self.label}: its pre-tokenizer is none that llama.cpp is known to have here",
                    "use format compressed-tensors or gptq, or llama.cpp's own conversion for this model",
                )

    def _text(self, files: Mapping[str, Any], name: str) -> str:
        try:
            return str(files[name].read().decode("utf-8"))
        except ValueError as error:
            raise QkitError(f"{self.label}/{name} is not UTF-8 text: {error}", "fetch it again") from error

    def _object(self, files: Mapping[str, Any], name: str) -> dict[str, Any]:
        return self._parsed(name, self._text(files, name))

    def _parsed(self, name: str, text: str) -> dict[str, Any]:
        try:
            found = parse_json(text)
        except ValueError as error:
            raise QkitError(f"{self.label}/{name} is not valid JSON: {error}", "fetch it again") from error
        return found if isinstance(found, dict) else {}

    def _checked(self) -> Any:
        """The tokenizer. Its own library reads tokenizer.json, so that every field of it is what it should be."""
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(self.text)
        except Exception as error:  # the library raises bare ones
            raise QkitError(f"{self.label}: its tokenizer.json cannot be read: {error}", "fetch it again") from error

    def metadata(self, rows: int) -> dict[str, str | Typed]:
        """rows: of the embedding. Raises QkitError where there are fewer than tokens."""
        if rows < self.size:
            raise QkitError(f"{self.label}: {self.size} tokens in the vocabulary, {rows} rows in the embedding")
        merges = [m if isinstance(m, str) else " ".join(m) for m in self.model.get("merges") or []]
        tokens = [self.tokens.get(i, f"[PAD{i}]") for i in range(rows)]
        types = [self._type(i) for i in range(rows)]
        found: dict[str, str | Typed] = {"tokenizer.ggml.model": "gpt2" if self.byte_level else "llama"}
        found["tokenizer.ggml.pre"] = str(self.pre) if self.byte_level else "default"
        found["tokenizer.ggml.tokens"] = Typed("str", tokens)
        found["tokenizer.ggml.token_type"] = Typed("i32", types)
        if self.byte_level:
            found["tokenizer.ggml.merges"] = Typed("str", merges)
        else:
            found["tokenizer.ggml.scores"] = Typed("f32", self._scores(tokens, merges))
            found["tokenizer.ggml.add_space_prefix"] = Typed("bool", self._prefix())
        return {**found, **self._special()}

    def _type(self, index: int) -> int:
        if index not in self.tokens:
            return UNUSED
        added = self.added.get(index)
        token = self.tokens[index]
        if token == self.model.get("unk_token") or (not self.byte_level and token == "<unk>"):
            return UNKNOWN
        if added is not None:
            return CONTROL if added.get("special") else USER
        return BYTE if not self.byte_level and _BYTE_TOKEN.fullmatch(token) else NORMAL

    def _scores(self, tokens: list[str], merges: list[str]) -> list[float]:
        order: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            order.setdefault(merge.replace(" ", ""), rank)
        return [float(-order[t]) if t in order else _NEVER for t in tokens]

    def _prefix(self) -> bool:
        """Whether a space is put before the text."""
        for part in ("normalizer", "pre_tokenizer"):
            given = self.given.get(part)
            if _mentions(given, "Prepend"):
                return True
            for found in _parts(given):
                if found.get("type") == "Metaspace":
                    return found.get("prepend_scheme", "always") != "never"
        return False

    def _special(self) -> dict[str, str | Typed]:
        ids = {token: index for index, token in self.tokens.items()}
        found: dict[str, str | Typed] = {}
        for ours, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token = self.settings.get(f"{ours}_token")
            if isinstance(token, Mapping):
                token = token.get("content")
            if isinstance(token, str) and token in ids:
                found[f"tokenizer.ggml.{key}_token_id"] = Typed("u32", ids[token])
        first, last = self._wrapped()
        bos, eos = (found.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos"))
        found["tokenizer.ggml.add_bos_token"] = Typed("bool", isinstance(bos, Typed) and first == bos.value)
        found["tokenizer.ggml.add_eos_token"] = Typed("bool", isinstance(eos, Typed) and last == eos.value)
        template = self._template()
        if template:
            found["tokenizer.chat_template"] = template
        return found

    def _wrapped(self) -> tuple[int | None, int | None]:
        """The ids that the tokenizer puts before and after a text."""
        plain, wrapped = (self.tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        at = next((i for i in range(len(wrapped)) if wrapped[i : i + len(plain)] == plain), 0)
        before, after = wrapped[:at], wrapped[at + len(plain) :]
        return (before[0] if before else None), (after[-1] if after else None)

    def _template(self) -> str | None:
        if "chat_template.jinja" in self.templates:
            return self.templates["chat_template.jinja"]
        given: Any = self.settings.get("chat_template")
        if given is None and "chat_template.json" in self.templates:
            given = self._object(self._files, "chat_template.json").get("chat_template")
        if isinstance(given, list):  # several by name
            named = (each for each in given if isinstance(each, Mapping))
            given = next((each.get("template") for each in named if each.get("name") == "default"), None)
        return given if isinstance(given, str) else None


def _from_transformers(source: Source) -> str:
    """A tokenizer.json made by transformers from the older files."""
    from ...text.tokenizer import load_tokenizer

    backend = getattr(load_tokenizer(source), "backend_tokenizer", None)
    if backend is None:
        raise QkitError(f"{source.label} has no tokenizer.json", "fetch it from where the weights came from")
    return str(backend.to_str())


def _parts(given: Any) -> list[Mapping[str, Any]]:
    """A component of a tokenizer.json, taken apart where it is a sequence."""
    if not isinstance(given, Mapping):
        return []
    inner = next((given[key] for key in ("pretokenizers", "normalizers", "decoders") if key in given), None)
    return [given] if inner is None else [part for each in inner for part in _parts(each)]


def _mentions(given: Any, kind: str) -> bool:
    return any(part.get("type") == kind for part in _parts(given))
