"""GGUF files taken apart into pairs and tensors, changed, and put together again (ggml/docs/gguf.md)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from random import Random
from typing import Any

from .mutate import INTEGERS, NAMES

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass
class Parts:
    """pairs: [key, type, value], of an array a value is [type, values]; tensors: [name, dims, ggml type, offset]."""

    version: int
    pairs: list[list[Any]]
    tensors: list[list[Any]]
    data: bytes


def take_apart(raw: bytes) -> Parts:
    at = 8

    def number(layout: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + layout, raw, at)
        at += struct.calcsize("<" + layout)
        return value

    def string() -> bytes:
        nonlocal at
        size = number("Q")
        at += size
        return raw[at - size : at]

    def value(kind: int) -> Any:
        if kind == _STRING:
            return string()
        if kind == _ARRAY:
            inner, count = number("I"), number("Q")
            return [inner, [value(inner) for _ in range(count)]]
        return number(_SCALARS[kind])

    version = int.from_bytes(raw[4:8], "little")
    tensor_count, pair_count = number("Q"), number("Q")
    pairs = []
    for _ in range(pair_count):
        key, kind = string(), number("I")
        pairs.append([key, kind, value(kind)])
    tensors = []
    for _ in range(tensor_count):
        name, dims = string(), number("I")
        tensors.append([name, [number("Q") for _ in range(dims)], number("I"), number("Q")])
    return Parts(version, pairs, tensors, raw[at + -at % 32 :])


def put_together(parts: Parts) -> bytes:
    out = bytearray(b"GGUF" + struct.pack("<IQQ", parts.version, len(parts.tensors), len(parts.pairs)))

    def string(raw: bytes) -> bytes:
        return struct.pack("<Q", len(raw)) + raw

    def value(kind: int, given: Any) -> bytes:
        if kind == _STRING:
            return string(given)
        if kind == _ARRAY:
            inner, values = given
            return struct.pack("<IQ", inner, len(values)) + b"".join(value(inner, each) for each in values)
        return struct.pack("<" + _SCALARS[kind], given)

    for key, kind, given in parts.pairs:
        out += string(key) + struct.pack("<I", kind) + value(kind, given)
    for name, dims, kind, offset in parts.tensors:
        out += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return bytes(out) + b"\0" * (-len(out) % 32) + parts.data


def change_gguf(raw: bytes, rng: Random) -> bytes:
    parts = take_apart(raw)
    if parts.tensors and rng.random() < 0.35:
        _change_tensor(parts, rng)
    else:
        _change_pair(parts, rng)
    return put_together(parts)


def _change_pair(parts: Parts, rng: Random) -> None:
    pair = rng.choice(parts.pairs)
    kind = rng.randrange(6)
    if kind == 0:
        parts.pairs.remove(pair)
    elif kind == 1:
        pair[1:] = _value(rng)
    elif kind == 2:
        pair[0] = rng.choice([*(n.encode() for n in NAMES), rng.choice(parts.pairs)[0], b"llama.expert_count",
                              b"llama.rope.scaling.type", b"split.count", b"general.alignment"])  # fmt: skip
    elif kind == 3:
        parts.pairs.append([rng.choice(_KEYS), *_value(rng)])
    elif pair[1] == _ARRAY and pair[2][1]:
        values = pair[2][1]
        change = rng.randrange(4)
        if change == 0:
            values.pop(rng.randrange(len(values)))
        elif change == 1:
            values.append(rng.choice(values))
        elif change == 2:
            values[rng.randrange(len(values))] = b"\xff\xfe" if pair[2][0] == _STRING else rng.choice((0, 1, 2, 6))
        else:
            values[rng.randrange(len(values))] = rng.choice(values)
    elif pair[1] == 4:
        pair[2] = rng.choice(
            [n for n in INTEGERS if n < 1 << 32] + [pair[2] + 1, pair[2] * 2 & 0xFFFFFFFF, pair[2] // 2]
        )
    elif pair[1] == 6:
        pair[2] = rng.choice((0.0, -1.0, math.inf, -math.inf, math.nan, 1e38, 1e-38, 1.5))
    else:
        pair[1:] = _value(rng)


_KEYS = [
    f"llama.{key}".encode()
    for key in (
        "expert_count", "expert_used_count", "rope.scaling.type", "rope.scaling.factor", "rope.freq_base",
        "rope.scaling.original_context_length", "rope.scaling.attn_factor", "attention.sliding_window",
        "attention.key_length", "vocab_size", "rope.scale_linear", "rope.dimension_count",
    )
] + [b"tokenizer.ggml.scores", b"tokenizer.ggml.add_bos_token", b"tokenizer.chat_template", b"general.name",
     b"tokenizer.ggml.unknown_token_id", b"split.count", b"split.no", b"general.license"]  # fmt: skip


def _value(rng: Random) -> list[Any]:
    kind = rng.choice((0, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12))
    if kind == _STRING:
        return [
            kind,
            rng.choice(
                (b"", b"yarn", b"linear", b"none", b"llama", b"gpt2", b"\xff", b"x" * 5000, b"\x1b[0m", b"a\nb")
            ),
        ]
    if kind == _ARRAY:
        inner = rng.choice((0, 4, 5, 6, 8))
        fill = b"a" if inner == _STRING else rng.choice((0, 1, 2))
        return [kind, [inner, [fill] * rng.choice((0, 1, 2, 300))]]
    if kind in (6, 12):
        return [kind, rng.choice((0.0, -1.0, math.inf, math.nan, 1e38, 4.0))]
    size = 8 * struct.calcsize("<" + _SCALARS[kind])
    number = rng.choice(INTEGERS) & ((1 << size) - 1)
    if kind in (3, 5, 11):
        number -= 1 << (size - 1)
    return [kind, bool(number & 1) if kind == 7 else number]


def _change_tensor(parts: Parts, rng: Random) -> None:
    tensor = rng.choice(parts.tensors)
    kind = rng.randrange(6)
    if kind == 0:
        parts.tensors.remove(tensor)
    elif kind == 1:
        dims = tensor[1]
        other = [dims[::-1], [*dims, 1], [*dims, 2], dims[:1], [n * 2 for n in dims], [max(1, n // 2) for n in dims]]
        tensor[1] = rng.choice([*other, [32], [32, 1], [rng.choice(INTEGERS)] * 2])
    elif kind == 2:
        tensor[2] = rng.randrange(45)
    elif kind == 3:
        tensor[3] = rng.choice([0, 32, 64, rng.choice(INTEGERS), rng.choice(parts.tensors)[3]])
    elif kind == 4:
        tensor[0] = rng.choice(
            [*(n.encode() for n in NAMES), rng.choice(parts.tensors)[0], b"rope_freqs.weight", b"output.weight"]
        )
    else:
        at = rng.randrange(len(parts.data) + 1)
        parts.data = parts.data[:at] + rng.randbytes(16) + parts.data[at + 16 :]
