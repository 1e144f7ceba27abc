"""Texts that users name: a file, a .jsonl or parquet file of rows, a data set on the Hub."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from .. import units
from ..errors import QkitError
from ..untrusted import parse_json

LOCAL = "a local file"  # a path or a file name has no place in a model card
_HUB_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
_HUB_TEXT_LIMIT = 64 << 20  # characters read of a Hub data set; calibration needs a few million at most
MAX_BYTES = 1 << 30  # of a text, unpacked
_PIECE = 4 << 20  # of a file, at a time
_ROWS = 256  # of a parquet file in memory at a time
_BETWEEN = "\n\n"  # documents


@dataclass(frozen=True)
class Document:
    """text: as the model reads it; words: what was said in it, without a chat template around it."""

    text: str
    words: str

    def within(self, start: int, end: int) -> str:
        """The words of text[start:end]; of a chat all, as its template hides which they are."""
        return self.text[start:end] if self.words == self.text else self.words


@dataclass(frozen=True)
class Text:
    """Documents, and what results call them. sha256: of the UTF-8 bytes of `content`."""

    name: str
    documents: tuple[Document, ...]

    @cached_property
    def content(self) -> str:
        """The documents one after the other; a single one as it is."""
        if len(self.documents) == 1:
            return self.documents[0].text
        return _BETWEEN.join(d.text for d in self.documents) + "\n"

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    def words(self, prefix: int) -> str:
        """What is said in the first `prefix` characters of the content; of a chat that begins in them, all of it."""
        found, at = [], 0
        for document in self.documents:
            if at >= prefix:
                break
            found.append(document.within(0, prefix - at))
            at += len(document.text) + len(_BETWEEN)
        return _BETWEEN.join(found)


def plain(name: str, content: str) -> Text:
    """A text of one document, which is its own words."""
    return Text(name, (Document(content, content),))


def check_spec(spec: str | None) -> None:
    """Raises QkitError where `spec` is neither a readable file here nor of the form of a Hub data set id. Reads no text
    and asks no network."""
    if spec is None:
        return
    path = Path(spec).expanduser()
    if path.is_dir():
        raise QkitError(f"{spec} is a folder, not a text file")
    if path.exists():
        if not os.access(path, os.R_OK):
            raise QkitError(f"cannot read {spec}", "check the permissions of the file and of its folder")
    elif path.is_absolute() or spec.count("/") != 1 or spec.startswith((".", "~")) or path.suffix:
        raise QkitError(f"no such text file: {spec}", "give a UTF-8 text file, a .jsonl file, or a Hub data set id")


def read_text(spec: str, tokenizer: Any = None) -> Text:
    """The text a user named: a UTF-8 file, a .jsonl file ("text" or "messages" per line), or a Hub data set id.

    "messages" are rendered with the tokenizer's chat template where it has one. Raises QkitError for text
    that is missing, empty, not UTF-8, or a data set that cannot be reached.
    """
    check_spec(spec)
    path = Path(spec).expanduser()
    if path.exists():
        documents = _parse(path.name, _read_bytes(path), tokenizer, spec)
        return _text(spec, documents, shown=LOCAL)
    return _hub_text(spec, tokenizer)


def _text(name: str, documents: Sequence[Document], shown: str | None = None) -> Text:
    """shown: what results call it, where its name is the user's own business."""
    if not any(d.text.strip() for d in documents):
        raise QkitError(f"{name} holds no text")
    return Text(shown or name, tuple(documents))


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return _at_most(file, str(path))
    except OSError as error:
        raise QkitError(f"cannot read {path}: {error.strerror or error}") from None


def _at_most(file: BinaryIO, name: str) -> bytes:
    """All of it; read piece by piece, since a file may be a device without end, and a packed one a bomb."""
    data = bytearray()
    while piece := file.read(_PIECE):
        data += piece
        if len(data) > MAX_BYTES:
            raise QkitError(f"{name} is more than {units.size(MAX_BYTES)} of text", "a few million characters will do")
    return bytes(data)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QkitError(
            f"{name} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}",
            "convert it, for instance with: iconv -f LATIN1 -t UTF-8",
        ) from None


def _parse(filename: str, data: bytes, tokenizer: Any, name: str) -> list[Document]:
    if filename.endswith(".gz"):
        import gzip
        import zlib

        try:
            with gzip.open(io.BytesIO(data)) as file:
                data = _at_most(file, name)  # type: ignore[arg-type]
        except (OSError, EOFError, zlib.error) as error:
            raise QkitError(f"{name} cannot be decompressed: {error}") from None
        filename = filename[:-3]
    if filename.endswith(".parquet"):
        return _parquet(data, tokenizer, name)
    content = _decode(data, name)
    if not filename.endswith(".jsonl"):
        return [Document(content, content)]
    documents = []
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() would also split at U+2028, inside a string
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise QkitError(f"{name}, line {number}: not JSON ({error})") from None
        documents.append(_row(row, tokenizer, f"{name}, line {number}"))
    return _ended(documents)


def _ended(documents: list[Document]) -> list[Document]:
    """A single row ends its line, as the last of many does."""
    return [Document(f"{d.text}\n", f"{d.words}\n") for d in documents] if len(documents) == 1 else documents


def _row(row: Any, tokenizer: Any, where: str) -> Document:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return Document(row["text"], row["text"])
    messages = row.get("messages") if isinstance(row, dict) else None
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not valid or not isinstance(messages, list):
        raise QkitError(
            f'{where}: neither a "text" string nor "messages" with a role and a content',
            'one JSON object a line, such as {"text": "..."}',
        )
    words = "\n".join(m["content"] for m in messages)
    if not getattr(tokenizer, "chat_template", None):
        return Document(words, words)
    try:
        return Document(tokenizer.apply_chat_template(messages, tokenize=False), words)
    except Exception as error:  # a template is a program: it may fail in any way, or want more memory than there is
        raise QkitError(f"{where}: the model's chat template refuses these messages: {error}") from None


def _parquet(data: bytes, tokenizer: Any, name: str) -> list[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise QkitError(f"{name} is stored as parquet", "pip install pyarrow, or use a .jsonl or text file") from None
    documents: list[Document] = []
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        names = file.schema_arrow.names
        columns = [c for c in ("text", "messages") if c in names]
        if not columns:
            raise QkitError(f'{name} has no "text" or "messages" column, only: {", ".join(names)}')
        left = MAX_BYTES
        # A value that is repeated takes no room in the file: only what was unpacked says how much there is.
        for batch in file.iter_batches(_ROWS, columns=columns[:1]):
            left -= batch.nbytes
            if left < 0:
                raise QkitError(f"{name} unpacks to more than {units.size(MAX_BYTES)}", "take a part of it")
            rows = batch.to_pylist()
            documents += [_row(row, tokenizer, f"{name}, row {len(documents) + i}") for i, row in enumerate(rows)]
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # a name that is not UTF-8 is a ValueError
        raise QkitError(f"{name} is not a parquet file that can be read: {error}") from None
    return _ended(documents)


def _hub_call(spec: str, call: Callable[[], Any]) -> Any:
    """Run a huggingface_hub call; whatever it says about network, rights or names becomes a QkitError."""
    try:
        return call()
    except Exception as error:  # its HTTP client differs between versions, and their errors share no base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QkitError(
            f"no file {spec}, and no data set of that name could be read from the Hub: {reason}",
            "check the name and the network, or give a UTF-8 text file with --calib FILE",
        ) from error


def _hub_text(spec: str, tokenizer: Any) -> Text:
    """Text of a Hub data set: its first training file in a format that can be read without `datasets`."""
    from huggingface_hub import HfApi, hf_hub_download

    # dataset_info, unlike list_repo_files, does not spend half a minute on retries without a network.
    info = _hub_call(spec, lambda: HfApi().dataset_info(spec, timeout=10))
    files = [entry.rfilename for entry in info.siblings or ()]
    usable = [f for f in sorted(files) if f.endswith(_HUB_SUFFIXES)]
    if not usable:
        raise QkitError(f"data set {spec} has no file that can be read", "known: " + ", ".join(_HUB_SUFFIXES))
    chosen = next((f for f in usable if "train" in f), usable[0])
    local = _hub_call(spec, lambda: hf_hub_download(spec, chosen, repo_type="dataset"))
    name = f"{spec}/{chosen}"
    return _text(name, list(_within(_parse(chosen, _read_bytes(Path(local)), tokenizer, name), _HUB_TEXT_LIMIT)))


def _within(documents: Sequence[Document], limit: int) -> Iterator[Document]:
    """The first documents, of `limit` characters in all; a single one is cut."""
    used = 0
    for document in documents:
        if used >= limit:
            return
        used += len(document.text)
        yield document if used <= limit else Document(document.text[: limit - used], document.words)
