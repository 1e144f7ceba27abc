"""Mutations that know a file's structure: a case is a folder of small files, and what comes out is one with a fault.

A case maps names to bytes, or to what else can lie in a folder: "fifo", "dir", "link:TARGET".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Case = dict[str, "bytes | str"]

_RAW = "@@raw:"  # a string that stands for text which is no value of Python
_DEEP = 100_000
RAW = {
    "huge": "1e400", "digits": "9" * 5000, "many": "9" * 4000, "nan": "NaN", "inf": "-Infinity", "half": '"\\ud800"',
    "deep": "[" * _DEEP + "]" * _DEEP, "nested": "[" * 700 + "]" * 700, "deeper": '{"a":' * 900 + "1" + "}" * 900,
    "open": "[", "null": '"\\u0000"',
}  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 16, 128, 255, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 63, 1 << 64,
    10**30, 10**400, -(10**400), 0.5, -0.5, 1e308, 5e-324, 1e-12, float("nan"), float("inf"), "", "a", "4", "x" * 5000,
    "../../etc/passwd", "/dev/zero", "a\0b", "\x1b[31mred", "\n", "(a+)+$", "re:(a|a)*$", "re:(", "*", "Linear", ".",
    [], {}, [[]], [None], [0, 0], [1, 2], {"": {}}, ["a"], [{}], {"a": [1]}, *(_RAW + name for name in RAW),
]  # fmt: skip
INTEGERS = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, (1 << 16) - 1, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31,
            (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 48, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip
NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "x" * 300, "x" * 70_000, "layers." + "9" * 5000,
         "model.layers.99999999999.mlp.up_proj.weight", "a" * 40 + "!", "\x1b[31m", "é" * 90]  # fmt: skip
# Of YAML and of templates.
WORDS = [b"&x [*x]", b"<<: *x", b"!!python/object/apply:os.system [id]", b"- " * 500, b"? ", b"1_000", b"2020-99-99",
         b"0x", b"!!binary x", b"!!timestamp x", b"!!int x", b"!!float .", b"!!null x", b"{% for a in b %}",
         b"{{ 1 / 0 }}", b"{{ messages.x.y }}", b"{{ 'a' * 1000000 * 10000 }}", b"{{ ''.__class__ }}"]  # fmt: skip
LINKS = ("/dev/zero", "/etc/passwd", ".", "nowhere", "../x", "/dev/tty")
PLACES = ["fifo", "dir", *(f"link:{place}" for place in LINKS)]


def mutated(case: Case, rng: Random, pool: list[tuple[str, Any]], names: list[str], places: bool) -> Case:
    """A copy with one to four faults. pool: keys and values of the seeds; names: files that may be touched; places:
    other things may lie where they were."""
    case = dict(case)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        name = rng.choice(names)
        content = case.get(name)
        if places and rng.random() < 0.02:
            _misplace(case, name, rng)
        elif isinstance(content, bytes):
            case[name] = mutated_file(name, content, rng, pool)
    return case


def _misplace(case: Case, name: str, rng: Random) -> None:
    """Something else where the file was."""
    kind = rng.randrange(3)
    if kind == 0:
        case.pop(name, None)
    elif kind == 1:
        case[name] = rng.choice(PLACES)
    else:
        case[rng.choice(["x", "tokenizer.json", "a.safetensors", "README.md"])] = case.pop(name, b"")


def mutated_file(name: str, content: bytes, rng: Random, pool: list[tuple[str, Any]]) -> bytes:
    kinds: list[tuple[str, Callable[..., bytes]]] = [
        (".json", of_json), (".safetensors", of_safetensors), (".gguf", of_gguf), (".jsonl", of_lines),
        (".sse", of_lines), (".yaml", of_text), (".md", of_text), (".txt", of_text), (".jinja", of_text),
    ]  # fmt: skip
    found = next((mutate for suffix, mutate in kinds if name.endswith(suffix)), of_bytes)
    if found is not of_bytes and rng.random() < 0.85:
        try:
            return found(content, rng, pool)
        except (
            ValueError,
            KeyError,
            TypeError,
            struct.error,
            RecursionError,
            IndexError,
            OverflowError,
            AttributeError,
        ):
            pass  # a file that an earlier fault has left without structure
    return of_bytes(content, rng)


def of_bytes(content: bytes, rng: Random) -> bytes:
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(8)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
    elif kind == 2:
        del data[at : at + rng.choice((1, 4, 8, 100))]
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        size = rng.choice((1, 2, 4, 8))
        data[at : at + size] = (rng.choice(INTEGERS) & ((1 << 8 * size) - 1)).to_bytes(
            size, rng.choice(("little", "big"))
        )  # type: ignore[arg-type]
    elif kind == 5:
        data[at:at] = data[: rng.randrange(len(data) + 1)][-200:]
    elif kind == 6:
        return rng.randbytes(rng.randrange(300))
    else:
        data[at:at] = rng.choice(
            (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{", b'"', b"[" * 3000, b"\r\n\r\n", b"%", b"&a *a")
        )
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(owner, key) of every value in a document, outermost first."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, child in items:
        yield value, key
        yield from places(child)


def change(document: Any, rng: Random, pool: list[tuple[str, Any]]) -> Any:
    """One value, key or entry of a document replaced, dropped or added; what stands in the document's place."""
    spots = list(places(document))
    if not spots or rng.random() < 0.02:
        return rng.choice(VALUES)
    owner, key = rng.choice(spots[:20]) if rng.random() < 0.3 else rng.choice(spots)
    kind = rng.randrange(10)
    if kind < 4:
        owner[key] = rng.choice(VALUES)
    elif kind == 4:
        del owner[key]
    elif kind == 5:
        owner[key] = rng.choice(pool)[1] if pool else None
    elif kind == 6 and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
        owner[key] = rng.choice(
            (lambda v: v + 1, lambda v: v - 1, lambda v: v * 2, lambda v: -v, lambda v: v / 3, str)
        )(owner[key])
    elif kind == 7 and isinstance(owner, dict):
        owner[rng.choice(NAMES)] = owner.pop(key)
    elif isinstance(owner, dict):
        owner[rng.choice(pool)[0] if pool else "x"] = (
            rng.choice(VALUES) if rng.random() < 0.7 else rng.choice(pool or [("", 1)])[1]
        )
    else:
        owner.insert(0, rng.choice(VALUES))
    return document


def dumps(document: Any, rng: Random) -> bytes:
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    for name, raw in RAW.items():
        text = text.replace(f'"{_RAW}{name}"', raw)
    return text.encode("utf-8", "surrogatepass")


def of_json(content: bytes, rng: Random, pool: list[tuple[str, Any]]) -> bytes:
    text = dumps(change(json.loads(content), rng, pool), rng)
    if rng.random() < 0.03 and text.startswith(b"{") and len(text) > 2:  # a key twice
        return b'{"model_type": "llama", "a": 1, "a": [], ' + text[1:]
    return text


def of_lines(content: bytes, rng: Random, pool: list[tuple[str, Any]]) -> bytes:
    """Lines of JSON, of which some stand after "data: "."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 2:
        lines[at] = of_bytes(lines[at], rng)
    else:
        head = b"data: " if lines[at].startswith(b"data: ") else b""
        lines[at] = head + of_json(lines[at][len(head) :], rng, pool)
    return b"\n".join(lines)


def of_text(content: bytes, rng: Random, pool: list[tuple[str, Any]]) -> bytes:
    """Words of the text replaced by values, lines doubled and dropped."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        lines[at] = of_bytes(lines[at], rng)
    else:
        words = lines[at].split(b" ")
        words[rng.randrange(len(words))] = rng.choice((dumps(rng.choice(VALUES), rng), *WORDS))
        lines[at] = b" ".join(words)
    return b"\n".join(lines)


_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def of_safetensors(content: bytes, rng: Random, pool: list[tuple[str, Any]]) -> bytes:
    """Faults of the header; or tensors that are others than they were, in a file that is in order."""
    length = int.from_bytes(content[:8], "little")
    table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if rng.random() < 0.4:
        header = dumps(change(table, rng, pool), rng)
        return len(header).to_bytes(8, "little") + header + data
    tensors = {
        name: [e["dtype"], e["shape"], data[slice(*e["data_offsets"])]]
        for name, e in table.items()
        if name != "__metadata__"
    }
    for _ in range(rng.choice((1, 1, 2))):
        _change_tensor(tensors, rng)
    return safetensors_bytes(tensors, table.get("__metadata__"))


def _change_tensor(tensors: dict[str, list[Any]], rng: Random) -> None:
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    kind = rng.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice([*NAMES, *tensors, name + "_x", name.replace("weight", "bias")]) or "x"] = tensors.pop(name)
    elif kind == 2:
        tensor[0] = rng.choice(
            ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E8M0"]
        )
    elif kind == 3:
        size = math.prod(tensor[1])
        shape = tensor[1]
        other = [shape[::-1], shape[:1], [1, *shape], [2, *shape], [n // 2 for n in shape]]
        tensor[1] = rng.choice([*other, [], [0], [size], [1, size], [size, 1], [0, 5], [1] * 20, [3, 5], [7]])
    elif kind == 4:
        tensor[2] = rng.choice([b"\xff", b"\0", b"\x7f", b"\x80\x01"]) * len(tensor[2])
    else:
        tensor[2] = of_bytes(tensor[2], rng)


def safetensors_bytes(tensors: dict[str, list[Any]], metadata: Any = None) -> bytes:
    """A file that is in order; a tensor's bytes are cut, or filled with zeros, to its size."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = bytearray()
    for name, (dtype, shape, data) in tensors.items():
        size = min(math.prod(shape) * _BYTES.get(dtype, 1), 1 << 20)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + size]}
        body += data[:size].ljust(size, b"\0")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


def of_gguf(content: bytes, rng: Random, pool: list[tuple[str, Any]]) -> bytes:
    from .gguf import change_gguf

    return change_gguf(content, rng)
