"""Text -> token windows, for calibration and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from ..errors import QkitError
from ..models.families import EMBEDDINGS
from . import defaults
from .read import Document, Text, read_text
from .sketch import sketch

if TYPE_CHECKING:
    import torch

    from ..sources.types import Source

_SEED = 0  # of the places that calibration windows are taken from


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows and where they come from.

    tokens  int64 [samples, length], on the CPU
    name    "a local file", Hub id, or the name of the default text
    sha256  of the whole text's UTF-8 bytes
    sketch  of the text that was used (`text.sketch`), to tell evaluation text from it later
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
    """Windows from all over a text: see `spread`.

    spec: a UTF-8 text file; a .jsonl file whose lines have "text" or "messages"; a Hub data set id; None for
    the default text. No special tokens are added, except that where the tokenizer puts BOS before a text, BOS
    replaces the first token of each window. Raises QkitError where a user's text is too short; the default
    one gives as many whole windows as it holds, and says so in `note`.
    """
    if samples < 1 or length < 2:
        raise QkitError(f"calibration needs at least 1 sample of 2 tokens, got {samples} of {length}")
    text = defaults.calibration_text() if spec is None else read_text(spec, tokenizer)
    found = spread(text, tokenizer, samples, length)
    note = ""
    if found is None:
        tokens, prefix, bos = token_windows(
            text, tokenizer, samples, length, allow_fewer=spec is None, remedy="--calib-samples or --calib-len"
        )
        words = text.words(prefix)
        if len(tokens) < samples:
            note = (
                f"the default text gives {len(tokens)} windows of {length} tokens, not {samples}; "
                "name a longer one with --calib FILE"
            )
    else:
        tokens, words = found
        bos = _place_bos(tokens, tokenizer)
    return CalibrationSet(tokens, text.name, text.sha256, sketch(words), bos, note)


def spread(text: Text, tokenizer: Any, samples: int, length: int) -> tuple[torch.Tensor, str] | None:
    """(int64 [samples, length], the words they come from), taken from all over a text; None where it has hardly that
    many tokens, so that they have to be taken one after the other.

    A single document is divided into `samples` equal stretches; each window begins at a line of its own stretch. Where
    a stretch is too short for one, the stretches are taken as documents are. Of several documents, in an order that a
    fixed seed gives, each adds at most a window's worth (where they are fewer than the samples, an even share), from a
    place that the seed gives too, until there are enough tokens; windows follow each other through them. Where that is
    too little, documents that have more add more. The same text, samples and length give the same windows.
    """
    import torch

    need = samples * length
    if need > 4 * sum(len(d.text) for d in text.documents):  # a token is at least a byte
        return None
    random = Random(_SEED)
    if len(text.documents) > 1:
        ids, words = _of_documents(text.documents, tokenizer, need, length, random)
    else:
        (document,) = text.documents
        ids, words = _of_stretches(document, tokenizer, samples, length, random)
        if not ids:
            ids, words = _of_documents(list(_divide(document, samples)), tokenizer, need, length, random)
    if len(ids) < need:
        return None
    return torch.tensor(ids, dtype=torch.int64).view(samples, length), "\n\n".join(dict.fromkeys(words))


def _of_documents(
    documents: Sequence[Document], tokenizer: Any, need: int, length: int, random: Random
) -> tuple[list[int], list[str]]:
    """(`need` tokens, or all there are, the words of each document they come from)."""
    # random() alone promises the same numbers in every Python, shuffle() and sample() do not.
    drawn = sorted((random.random(), i, random.random()) for i in range(len(documents)))
    most = max(length, -(-need // len(documents)))
    while True:
        ids: list[int] = []
        words, cut = [], 0
        for _, i, place in drawn:
            text = documents[i].text
            start = _line(text, int(place * max(0, len(text) - 8 * most)))
            wanted = min(most, need - len(ids))
            _, found, ends = _tokenize_prefix(text, tokenizer, wanted, start)
            ids += found[:wanted]
            if found:
                words.append(documents[i].within(start, ends[:wanted][-1]))
            if len(ids) == need:
                return ids, words
            cut += start > 0 or len(found) > wanted
        if not cut:
            return ids, words
        most += -(-(need - len(ids)) // cut)


def _divide(document: Document, count: int) -> Iterator[Document]:
    """At most `count` parts of a document, of about the same size, each ending with a line."""
    text, start = document.text, 0
    while start < len(text):
        at = start + -(-len(text) // count)
        end = _line(text, at) if at < len(text) else len(text)
        yield Document(text[start:end], document.within(start, end))
        start = end


def _of_stretches(
    document: Document, tokenizer: Any, samples: int, length: int, random: Random
) -> tuple[list[int], list[str]]:
    """(a window of each stretch, its words); nothing where a stretch holds too few tokens."""
    content = document.text
    stretch = len(content) // samples
    ids: list[int] = []
    words = []
    for i in range(samples):
        first = i * stretch
        end, found, ends = _tokenize_prefix(content[first : first + stretch], tokenizer, length, 0)
        room = stretch - end  # characters that the window does not need: it may begin that much later
        if len(found) < length or room < 0:
            return [], []
        start = _line(content, first + int(random.random() * room)) if room else first
        _, found, ends = _tokenize_prefix(content, tokenizer, length, start)
        if len(found) < length:  # a long line took it to the end of the text
            start = first
            _, found, ends = _tokenize_prefix(content, tokenizer, length, start)
        ids += found[:length]
        words.append(document.within(start, ends[length - 1]))
    return ids, words


def _line(content: str, at: int) -> int:
    """The start of the first line after `at`, or `at` where there is none."""
    return content.find("\n", at) + 1 or at if at else 0


def token_windows(
    text: Text, tokenizer: Any, count: int, length: int, *, allow_fewer: bool = False, remedy: str = ""
) -> tuple[torch.Tensor, int, bool]:
    """The first count * length tokens of a text: (int64 [count, length], characters they cover, BOS placed).

    Only a prefix of the text is tokenized, cut at the end of a line a little past the last token wanted.
    allow_fewer: a short text gives fewer windows, at least one. Raises QkitError where there are too few.
    """
    import torch

    need = count * length
    _, ids, ends = _tokenize_prefix(text.content, tokenizer, need, 0)
    whole = min(count, len(ids) // length)
    if whole < (1 if allow_fewer else count):
        hint = "use a longer text" + (f", or lower {remedy}" if remedy else "")
        wanted = f"a window is {length}" if allow_fewer else f"{count} x {length} = {need} are needed"
        raise QkitError(f"{text.name} has {len(ids)} tokens; {wanted}", hint)
    tokens = torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)
    return tokens, ends[whole * length - 1], _place_bos(tokens, tokenizer)


def _place_bos(tokens: torch.Tensor, tokenizer: Any) -> bool:
    """Put BOS in place of each window's first token where the tokenizer puts it before a text; whether it does."""
    bos = adds_bos(tokenizer)
    if bos:
        tokens[:, 0] = tokenizer.bos_token_id
    return bos


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
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bos is not None and bool(ids) and ids[0] == bos


def _tokenize_prefix(text: str, tokenizer: Any, need: int, start: int) -> tuple[int, list[int], list[int]]:
    """(end, tokens of text[start:end], where in the text each ends): at least `need` where the text has them.

    The cut can change the last few tokens before it, so a cut text must hold some to spare; one that
    turns out short is tokenized anew at a greater length, which keeps the tokens those of the whole text.
    A tokenizer without offsets (one in Python) has each token end at `end`.
    """
    spare = 64
    size = 5 * (need + spare)
    fast = {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}
    while True:
        end = len(text) if start + size >= len(text) else text.find("\n", start + size) + 1 or len(text)
        # verbose=False: a text longer than the model's context is what we want here, and no cause for a warning.
        found = tokenizer(text[start:end], add_special_tokens=False, verbose=False, **fast)
        ids = found["input_ids"]
        if end == len(text) or len(ids) >= need + spare:
            return end, ids, [start + b for _, b in found["offset_mapping"]] if fast else [end] * len(ids)
        size = max(2 * size, int(1.1 * size * (need + spare) / max(1, len(ids))))
