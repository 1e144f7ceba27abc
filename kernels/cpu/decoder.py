"""`qk_decode`, `qk_prompt`: a decoding step of a whole model, or a piece of a prompt, in one call (qkit_decoder.h)."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from . import lib
from .matmul import CpuWeight

ACTIVATIONS = ("silu", "gelu_tanh")  # position = QkActivation
PROMPT = 240  # tokens that `prompt` takes at a time

_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


class _Linear(ctypes.Structure):
    _fields_ = (("quantized", lib.QkWeight), ("dense", _P), ("bias", _P), ("rows", _N), ("cols", _N), ("int8", _I))


_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", "q_norm", "k_norm")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in _LINEARS),
        *((name, _P) for name in (*_NORMS, "cosine", "sine")),
        ("window", _N),
    )  # fmt: skip


_SIZES = ("n_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", _P), *((name, _N) for name in _SIZES), ("embedding", _P), ("final_norm", _P), ("head", _Linear),
        ("embedding_scale", _F), ("attention_scale", _F), ("epsilon", _F), ("norm_offset", _F), ("activation", _I),
    )  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = (("keys", _P), ("values", _P), ("capacity", _N), ("start", _N))


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias. weight: a `CpuWeight`, or dense bfloat16 [out, in]; bias bfloat16 [out] or None."""

    weight: CpuWeight | torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One decoder block. Norms are the model's own bfloat16 tensors, read at every step, or None.

    cosine, sine  float32 [positions, head_dim / 2]; window: positions a query sees, its own included; 0: all
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    attention_norm: torch.Tensor
    attention_post_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    mlp_post_norm: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    cosine: torch.Tensor
    sine: torch.Tensor
    window: int = 0


@dataclass(frozen=True)
class Decoder:
    """A model as `decode` runs it. embedding bfloat16 [vocabulary, hidden]; final_norm bfloat16 [hidden]; norm_offset
    is added to the weights of all norms."""

    layers: tuple[Layer, ...]
    heads: int
    kv_heads: int
    head_dim: int
    embedding: torch.Tensor
    final_norm: torch.Tensor
    head: Linear
    embedding_scale: float
    attention_scale: float
    epsilon: float
    norm_offset: float
    activation: str
    _c: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def positions(self) -> int:
        """Length of the shortest rotary table."""
        return min(layer.cosine.shape[0] for layer in self.layers)

    @functools.cached_property
    def windows(self) -> tuple[int, ...]:
        return tuple(layer.window for layer in self.layers)

    @functools.cached_property
    def takes_prompts(self) -> bool:
        """Whether `prompt` serves it: every linear of a block packed, and heads of a size that it knows."""
        packed = all(isinstance(getattr(layer, name).weight, CpuWeight) for layer in self.layers for name in _LINEARS)
        return packed and self.head_dim % 8 == 0 and self.head_dim <= 256

    def struct(self) -> _Decoder:
        """The C structure; it points into this object's tensors."""
        if "both" not in self._c:
            layers = (_Layer * len(self.layers))(*map(_layer, self.layers))
            vocabulary, hidden = self.embedding.shape
            intermediate = _linear(self.layers[0].gate).rows
            decoder = _Decoder(
                ctypes.addressof(layers), len(self.layers), hidden, intermediate, self.heads, self.kv_heads,
                self.head_dim, vocabulary, _pointer(self.embedding, torch.bfloat16),
                _pointer(self.final_norm, torch.bfloat16), _linear(self.head), self.embedding_scale,
                self.attention_scale, self.epsilon, self.norm_offset, ACTIVATIONS.index(self.activation),
            )  # fmt: skip
            self._c.setdefault("both", (decoder, layers))  # at once: a structure points into its own layers
        result: _Decoder = self._c["both"][0]
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Copies (deepcopy, pickle) make their own structure."""
        return {**self.__dict__, "_c": {}}


def _pointer(t: torch.Tensor | None, dtype: torch.dtype) -> int | None:
    if t is None:
        return None
    if t.dtype != dtype or t.device.type != "cpu" or not t.is_contiguous():
        raise TypeError(f"expected contiguous {dtype} on the CPU, not {t.dtype} {tuple(t.stride())} on {t.device}")
    return t.data_ptr()


def _linear(l: Linear) -> _Linear:
    bias = _pointer(l.bias, torch.bfloat16)
    if isinstance(l.weight, CpuWeight):
        c = l.weight.c
        return _Linear(c, None, bias, c.rows, c.cols, l.weight.int8)
    rows, cols = l.weight.shape
    return _Linear(lib.QkWeight(), _pointer(l.weight, torch.bfloat16), bias, rows, cols, 0)


def _layer(l: Layer) -> _Layer:
    linears = [_linear(getattr(l, name)) for name in _LINEARS]
    norms = [_pointer(getattr(l, name), torch.bfloat16) for name in _NORMS]
    tables = [_pointer(getattr(l, name), torch.float32) for name in ("cosine", "sine")]
    return _Layer(*linears, *norms, *tables, l.window)


@functools.cache
def _functions() -> tuple[Any, Any, Any]:
    library = lib.library()
    library.qk_decode.argtypes = [_P, _P, _N, _N, _P, _P, _P, _P, _I, _I]
    library.qk_dense.argtypes = [_P, _P, _P, _P, _N, _N, _N, _I]
    library.qk_prompt.argtypes = [_P, _P, _N, _N, _P, _P, _N, _P, _I, _I]
    return library.qk_decode, library.qk_dense, library.qk_prompt


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [m, in] @ weight [out, in].T + bias [out], contiguous bfloat16, summed in float32: `decode`'s own.

    Raises TypeError for another type or layout and ValueError for sizes that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(weight.shape[0],)}")
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
    pointers = [_pointer(t, torch.bfloat16) for t in (weight, x, bias, out)]
    if status := _functions()[1](*pointers, x.shape[0], *weight.shape, lib._threads()):
        lib._raise(status, "qk_dense")
    return out


@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, each bfloat16 [batch, kv_heads, capacity, head_dim], the capacity a layer's own.
    starts: the entry in each layer's first slot; 0 but for layers with a window."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    starts: tuple[int, ...]
    _c: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls, keys: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...], starts: tuple[int, ...] = ()
    ) -> Cache:
        """Raises ValueError where a layer's values have another shape than its keys."""
        starts = starts or (0,) * len(keys)
        each = []
        for k, v, start in zip(keys, values, starts, strict=True):
            if k.shape != v.shape:
                raise ValueError(f"keys have shape {tuple(k.shape)}, values {tuple(v.shape)}")
            each.append(_Cache(_pointer(k, torch.bfloat16), _pointer(v, torch.bfloat16), k.shape[2], start))
        return cls(keys, values, starts, (_Cache * len(keys))(*each))

    def sequence(self, b: int) -> Any:
        """The C structures of one sequence's keys and values."""
        each = [
            _Cache(k[b].data_ptr(), v[b].data_ptr(), k.shape[2], start)
            for k, v, start in zip(self.keys, self.values, self.starts, strict=True)
        ]
        return (_Cache * len(each))(*each)

    def __reduce__(self) -> Any:
        """Copies (deepcopy, pickle) point into their own tensors."""
        return Cache.of, (self.keys, self.values, self.starts)


def decode(
    decoder: Decoder,
    cache: Cache,
    length: int,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    isa: str | None = None,
) -> torch.Tensor:
    """Appends a token to each sequence and returns the next one's logits, bfloat16 [batch, vocabulary].

    length     entries the sequences already have; each layer has a slot for one more, and those that its window sees
    tokens, positions, first   int64 [batch]: token ids, rotary positions, the first cache entry a sequence may see
    Raises ValueError where the sizes do not fit or a token is not in the vocabulary.
    """
    batch = tokens.shape[0]
    logits = torch.empty(batch, decoder.embedding.shape[0], dtype=torch.bfloat16)
    if len(cache.keys) != len(decoder.layers) or cache.keys[0].shape[0] != batch:
        raise ValueError(f"the cache is of {len(cache.keys)} layers and {cache.keys[0].shape[0]} sequences")
    if int(positions.max()) >= decoder.positions:
        raise ValueError(f"position {int(positions.max())} is beyond the rotary tables")
    if status := _functions()[0](
        ctypes.addressof(decoder.struct()), ctypes.addressof(cache._c), batch, length,
        _pointer(tokens, torch.int64), _pointer(positions, torch.int64), _pointer(first, torch.int64),
        logits.data_ptr(), lib._isa(isa), lib._threads(),
    ):  # fmt: skip
        lib._raise(status, "qk_decode")
    return logits


def prompt(
    decoder: Decoder,
    cache: Cache,
    sequence: int,
    length: int,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    first: int,
    want: bool,
    isa: str | None = None,
) -> torch.Tensor | None:
    """Appends tokens, at most `PROMPT`, to one sequence of the cache: entries length .. length + n. Returns the logits
    of the token after the last, bfloat16 [vocabulary], or None where they are not wanted. The model must take prompts.

    length     entries it has; each layer has slots for n more, and those that the window of the first sees
    tokens, positions   int64 [n]: token ids, rotary positions; first: the first entry that any of them may see
    Raises ValueError where the sizes do not fit or a token is not in the vocabulary.
    """
    logits = torch.empty(decoder.embedding.shape[0], dtype=torch.bfloat16) if want else None
    if len(cache.keys) != len(decoder.layers) or not 0 <= sequence < cache.keys[0].shape[0]:
        raise ValueError(f"the cache is of {len(cache.keys)} layers and {cache.keys[0].shape[0]} sequences")
    if int(positions.max()) >= decoder.positions:
        raise ValueError(f"position {int(positions.max())} is beyond the rotary tables")
    own = cache.sequence(sequence)
    if status := _functions()[2](
        ctypes.addressof(decoder.struct()), ctypes.addressof(own), len(tokens), length,
        _pointer(tokens, torch.int64), _pointer(positions, torch.int64), first,
        None if logits is None else logits.data_ptr(), lib._isa(isa), lib._threads(),
    ):  # fmt: skip
        lib._raise(status, "qk_prompt")
    return logits
