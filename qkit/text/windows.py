"""Text -> token windows, for calibration and for evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..models.families import EMBEDDINGS
from . import defaults as texts
from .defaults import NamedText

if TYPE_CHECKING:
    import torch

    from ..sources.types import Source

LOCAL = "a local file"  # a path or a file name has no place in a model card
_HUB_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
_HUB_TEXT_LIMIT = 64 << 20  # characters read of a Hub data set; calibration needs a few million at most


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows and where they come from.

    tokens  int64 [samples, length], on the CPU
    name    path, Hub id, or the name of the embedded text
    sha256  of the whole text's UTF-8 bytes
    sketch  of the text that was used (`qkit.text.sketch`), to tell evaluation text from it later
    bos     whether each window's first token was replaced by BOS
    note    what the user should be told, or ""
    """

    tokens: torch.Tensor
    name: str
    sha256: str
    sketch: str
    bos: bool
    note: str


def calibration_tokens(spec: str | None, tokenizer: Any, samples: int, length: int) -> CalibrationSet:
    """The first samples * length tokens of a text, as consecutive windows.

    spec: a UTF-8 text file; a .jsonl file whose lines have "text" or "messages"; a Hub data set id; None for
    the embedded text. No special tokens are added, except that where the tokenizer puts BOS before a text, BOS
    replaces the first token of each window. Raises QkitError where a user's text is too short; the embedded
    one gives as many whole windows as it holds, and says so in `note`.
    """
    if samples < 1 or length < 2:
        raise QkitError(f"calibration needs at least 1 sample of 2 tokens, got {samples} of {length}")
    named = texts.calibration_text() if spec is None else read_text(spec, tokenizer)
    tokens, used, bos = token_windows(
        named, tokenizer, samples, length, allow_fewer=spec is None, remedy="--calib-samples or --calib-len"
    )
    note = ""
    if len(tokens) < samples:
        note = (
            f"the embedded text gives {len(tokens)} windows of {length} tokens, not {samples}; "
            "name a longer one with --calib FILE"
        )
    return CalibrationSet(tokens, named.name, named.sha256, texts.sketch(used), bos, note)


def token_windows(
    named: NamedText, tokenizer: Any, count: int, length: int, *, allow_fewer: bool = False, remedy: str = ""
) -> tuple[torch.Tensor, str, bool]:
    """The first count * length tokens of a text: (int64 [count, length], the text they cover, BOS placed).

    Only a prefix of the text is tokenized, cut at the end of a line a little past the last token wanted.
    allow_fewer: a short text gives fewer windows, at least one. Raises QkitError where there are too few.
    """
    import torch

    need = count * length
    prefix, ids = _tokenize_prefix(named.text, tokenizer, need)
    whole = min(count, len(ids) // length)
    if whole < (1 if allow_fewer else count):
        hint = "use a longer text" + (f", or lower {remedy}" if remedy else "")
        raise QkitError(f"{named.name} has {len(ids)} tokens; {count} x {length} = {need} are needed", hint)
    tokens = torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)
    bos = adds_bos(tokenizer)
    if bos:
        tokens[:, 0] = tokenizer.bos_token_id
    return tokens, prefix, bos


def check_vocabulary(tokens: torch.Tensor, source: Source, tokenizer: Any) -> None:
    """Raises QkitError, naming the token, where the embedding of `source` has no row for one of `tokens`."""
    from ..models.config import text_config

    names = [n for n in source.names() if n.rpartition(".weight")[0].rpartition(".")[2] in EMBEDDINGS]
    rows = source.meta(names[0]).shape[0] if names else text_config(source.config).get("vocab_size")
    highest = int(tokens.max())
    if isinstance(rows, int) and highest >= rows:
        word = tokenizer.convert_ids_to_tokens(highest)
        raise QkitError(
            f"the tokenizer gives token {highest} ({word!r}), and the model's embedding has {rows} rows",
            "tokenizer and weights do not belong together: tokens were added without resizing the embedding",
        )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = _ids(tokenizer, "a", add_special_tokens=True)
    return bos is not None and bool(ids) and ids[0] == bos


def _ids(tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    # verbose=False: a text longer than the model's context is what we want here, and no cause for a warning.
    return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def _tokenize_prefix(text: str, tokenizer: Any, need: int) -> tuple[str, list[int]]:
    """A prefix of `text` and its tokens, at least `need` where the text has them.

    The cut can change the last few tokens before it, so a cut prefix must hold some to spare; a prefix that
    turns out short is tokenized anew at a greater length, which keeps the tokens those of the whole text.
    """
    spare = 64
    size = 5 * (need + spare)
    while True:
        end = len(text) if size >= len(text) else text.find("\n", size) + 1 or len(text)
        ids = _ids(tokenizer, text[:end])
        if end == len(text) or len(ids) >= need + spare:
            return text[:end], ids
        size = max(2 * size, int(1.1 * size * (need + spare) / max(1, len(ids))))


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


def read_text(spec: str, tokenizer: Any = None) -> NamedText:
    """The text a user named: a UTF-8 file, a .jsonl file ("text" or "messages" per line), or a Hub data set id.

    "messages" are rendered with the tokenizer's chat template where it has one. Raises QkitError for text
    that is missing, empty, not UTF-8, or a data set that cannot be reached.
    """
    check_spec(spec)
    path = Path(spec).expanduser()
    if path.exists():
        return _named(spec, _parse(path.name, _read_bytes(path), tokenizer, spec), shown=LOCAL)
    return _hub_text(spec, tokenizer)


def _named(name: str, text: str, shown: str | None = None) -> NamedText:
    """shown: what results call it, where its name is the user's own business."""
    if not text.strip():
        raise QkitError(f"{name} holds no text")
    return NamedText(shown or name, text, hashlib.sha256(text.encode()).hexdigest())


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise QkitError(f"cannot read {path}: {error.strerror or error}") from None


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QkitError(
            f"{name} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}",
            "convert it, for instance with: iconv -f LATIN1 -t UTF-8",
        ) from None


def _parse(filename: str, data: bytes, tokenizer: Any, name: str) -> str:
    if filename.endswith(".gz"):
        import gzip
        import zlib

        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise QkitError(f"{name} cannot be decompressed: {error}") from None
        filename = filename[:-3]
    if filename.endswith(".parquet"):
        return _parquet(data, tokenizer, name)
    content = _decode(data, name)
    if not filename.endswith(".jsonl"):
        return content
    parts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QkitError(f"{name}, line {number}: not JSON ({error})") from None
        parts.append(_row_text(row, tokenizer, f"{name}, line {number}"))
    return "\n\n".join(parts) + "\n"


def _row_text(row: Any, tokenizer: Any, where: str) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    messages = row.get("messages") if isinstance(row, dict) else None
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not valid or not isinstance(messages, list):
        raise QkitError(
            f'{where}: neither a "text" string nor "messages" with a role and a content',
            'one JSON object a line, such as {"text": "..."}',
        )
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(m["content"] for m in messages)
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise QkitError(f"{where}: the model's chat template refuses these messages: {error}") from None


def _parquet(data: bytes, tokenizer: Any, name: str) -> str:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise QkitError(f"{name} is stored as parquet", "pip install pyarrow, or use a .jsonl or text file") from None
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (OSError, pyarrow.ArrowException) as error:
        raise QkitError(f"{name} is not a parquet file that can be read: {error}") from None
    columns = [c for c in ("text", "messages") if c in table.column_names]
    if not columns:
        raise QkitError(f'{name} has no "text" or "messages" column, only: {", ".join(table.column_names)}')
    rows = table.select(columns[:1]).to_pylist()
    return "\n\n".join(_row_text(row, tokenizer, f"{name}, row {i}") for i, row in enumerate(rows)) + "\n"


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


def _hub_text(spec: str, tokenizer: Any) -> NamedText:
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
    return _named(name, _parse(chosen, _read_bytes(Path(local)), tokenizer, name)[:_HUB_TEXT_LIMIT])
