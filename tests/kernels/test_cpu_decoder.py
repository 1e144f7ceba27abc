"""The decoding step and pieces of a prompt in C++, on every instruction set this machine has, against torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qkit import kernels
from qkit.kernels import reference
from qkit.kernels.cpu import lib, matmul
from qkit.kernels.cpu.decoder import PROMPT, Cache, Decoder, Layer, Linear, decode, prompt
from qkit.kernels.weight import Weight

VOCABULARY = 67


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def linear(out: int, in_: int, bits: int, group: int, bias: bool = False) -> tuple[Linear, torch.Tensor]:
    """bits 0: dense; -4: a codebook; 88: 8 bits, whose inputs are quantized to int8. And its weight in float64."""
    b = torch.randn(out).bfloat16() if bias else None
    if bits == 0:
        w = (torch.randn(out, in_) / in_**0.5).bfloat16()
        return Linear(w, b), w.double()
    activations = "int8" if bits == 88 else None
    bits = 8 if activations else bits
    codes = torch.randint(0, 1 << abs(bits), (out, in_), dtype=torch.uint8)
    scale = (torch.rand(out, in_ // group) + 0.5) / in_**0.5 / (1 << (abs(bits) - 2))
    zero = torch.randint(6, 10, scale.shape, dtype=torch.uint8) if bits == 4 and bias else None
    w = Weight(kernels.pack(codes, abs(bits)), scale, zero, abs(bits), in_, "nf4" if bits < 0 else "int")
    return Linear(matmul.prepack(w, activations), b), reference.dequantize_weight(w, torch.float64)


def exactly(x: torch.Tensor) -> torch.Tensor:
    return x


class Model:
    """A decoder of random weights, and the same in float64."""

    def __init__(
        self, heads: int, kv_heads: int, dim: int, bits: tuple[int, ...], window: int, gemma: bool, layers: int
    ):
        hidden, wide, group = 96, 160, 32
        self.window, self.gemma, self.heads, self.kv_heads, self.dim = window, gemma, heads, kv_heads, dim
        self.angles = torch.arange(2048)[:, None] * torch.logspace(0, -3, dim // 2)[None]
        shapes = [(heads * dim, hidden), (kv_heads * dim, hidden), (kv_heads * dim, hidden), (hidden, heads * dim),
                  (wide, hidden), (wide, hidden), (hidden, wide)]  # fmt: skip

        def norm(n: int) -> torch.Tensor:
            return (torch.randn(n) * 0.1 + (0 if gemma else 1)).bfloat16()

        self.weights, self.layers = [], []
        for i in range(layers):
            made = [
                linear(*shape, bits[k % len(bits)], group if shape[1] % group == 0 else shape[1], bias=k < 3)
                for k, shape in enumerate(shapes)
            ]
            self.weights.append([w for _, w in made])
            post = norm(hidden) if gemma else None, norm(hidden) if gemma else None
            own = norm(dim) if gemma else None, norm(dim) if gemma else None
            tables = self.angles.cos().contiguous(), self.angles.sin().contiguous()
            norms = norm(hidden), post[0], norm(hidden), post[1], *own
            self.layers.append(Layer(*(l for l, _ in made), *norms, *tables, window if i % 2 == 0 else 0))
        head, self.head = linear(VOCABULARY, hidden, bits[0], 32)
        self.c = Decoder(
            tuple(self.layers), heads, kv_heads, dim, torch.randn(VOCABULARY, hidden).bfloat16(), norm(hidden), head,
            7.0 if gemma else 1.0, dim**-0.5, 1e-5, 1.0 if gemma else 0.0, "gelu_tanh" if gemma else "silu",
        )  # fmt: skip

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is None:
            return x
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + self.c.norm_offset)

    def turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        c, s = (f(self.angles[positions].double())[:, None] for f in (torch.cos, torch.sin))
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    def step(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        first: torch.Tensor,
        r: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Logits in float64; the keys and values of the tokens are left in `made`. r: how values are rounded where the
        C step and the model do."""
        self.made: list[tuple[torch.Tensor, torch.Tensor]] = []
        batch, length = len(tokens), keys[0].shape[2]
        x = r(self.c.embedding[tokens].double() * self.c.embedding_scale)

        def linear(l: Linear, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            if isinstance(l.weight, matmul.CpuWeight) and l.weight.int8 and r is not exactly:
                step = x.abs().amax(-1, keepdim=True) / 127
                x = (x / step).round() * step
            return r(x @ w.T + (0 if l.bias is None else l.bias.double()))

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, -1, self.dim)

        for i, layer in enumerate(self.layers):
            q, k, v, o, gate, up, down = zip(
                (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down), self.weights[i], strict=True
            )
            h = r(self.norm(x, layer.attention_norm))
            query = r(self.turned(self.norm(heads(linear(*q, h)), layer.q_norm), positions))
            key = r(self.turned(self.norm(heads(linear(*k, h)), layer.k_norm), positions))
            every = torch.cat((keys[i].double(), key[:, :, None]), 2).repeat_interleave(self.heads // self.kv_heads, 1)
            value = heads(linear(*v, h))
            self.made.append((key, value))
            weigh = torch.cat((values[i].double(), value[:, :, None]), 2)
            weigh = weigh.repeat_interleave(self.heads // self.kv_heads, 1)
            at = torch.arange(length + 1)
            seen = at[None] >= first[:, None]
            if layer.window:
                seen = seen & (at > length - layer.window)
            scores = (query[:, :, None] * every).sum(-1) * self.c.attention_scale
            scores = scores.masked_fill(~seen[:, None], -math.inf)
            p = (scores - scores.amax(-1, keepdim=True)).exp()
            y = (r(p)[..., None] * weigh).sum(2) / p.sum(-1, keepdim=True)
            y = linear(*o, r(y).view(batch, -1))
            x = x + self.norm(y, layer.attention_post_norm)
            h = r(self.norm(x, layer.mlp_norm))
            g = linear(*gate, h)
            act = torch.nn.functional.gelu(g, approximate="tanh") if self.gemma else torch.nn.functional.silu(g)
            x = x + self.norm(linear(*down, r(r(act) * linear(*up, h))), layer.mlp_post_norm)
        return linear(self.c.head, self.head, r(self.norm(x, self.c.final_norm)))

    def caches(self, batch: int, length: int) -> list[list[torch.Tensor]]:
        return [
            [torch.randn(batch, self.kv_heads, length + 1, self.dim).bfloat16() for _ in self.layers] for _ in range(2)
        ]


# heads, key-value heads, their size, bits of the linears in turns, window, like Gemma: groups of 1 to 7 queries, sizes
# that are no multiple of a vector, one head alone.
MODELS = [
    (4, 4, 32, (4,), 0, False),
    (6, 2, 24, (4, 8, 0), 300, False),
    (7, 1, 80, (0,), 5, True),
    (4, 1, 64, (8, -4), 400, True),
    (8, 2, 128, (-4, 4), 0, False),
    (4, 2, 32, (88,), 0, False),
]


def differs(model: Model, isa: str | None, batch: int, length: int) -> tuple[float, float]:
    """(error of the C step, error of the same step in float64 that rounds where it does), of the norm of the logits."""
    keys, values = model.caches(batch, length)
    tokens = torch.randint(0, VOCABULARY, (batch,))
    first = torch.arange(batch) * min(length, 3) // max(1, batch - 1)
    positions = length - first
    old = [[t[:, :, :length] for t in each] for each in (keys, values)]
    exact = model.step(*old, tokens, positions, first, exactly)
    rounded = model.step(*old, tokens, positions, first, lambda x: x.bfloat16().double())
    cache = Cache.of(tuple(keys), tuple(values))
    y = decode(model.c, cache, length, tokens, positions, first, isa).double()
    return float((y - exact).norm() / exact.norm()), float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize("isa", lib.isas())
@pytest.mark.parametrize("kind", MODELS, ids=str)
def test_as_close_as_rounding(isa: str, kind: Any) -> None:
    """Lengths around what is attended to at a time (256) and the windows, one sequence and several, padded ones too."""
    torch.set_num_threads(1)
    model = Model(*kind, layers=2)
    for batch, length in ((1, 0), (1, 255), (1, 256), (3, 7), (2, 700), (9, 300)):
        ours, theirs = differs(model, isa, batch, length)
        assert ours <= 2.0 * theirs + 1e-4, f"batch {batch}, length {length}: {ours} > {theirs}"


def stepped(
    model: Model, keys: list[torch.Tensor], values: list[torch.Tensor], tokens: torch.Tensor, positions: torch.Tensor,
    first: int, r: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """A prompt token by token in float64: the last one's logits, and the keys and values of all, layer by layer."""
    keys, values = ([t.double() for t in each] for each in (keys, values))
    logits = torch.empty(0)
    for token, position in zip(tokens, positions, strict=True):
        logits = model.step(keys, values, token[None], position[None], torch.tensor([first]), r)
        keys, values = (
            [torch.cat((t, made[which][:, :, None]), 2) for t, made in zip(each, model.made, strict=True)]
            for which, each in enumerate((keys, values))
        )
    return logits[0], keys, values


@pytest.mark.parametrize("kind", MODELS, ids=str)
def test_a_prompt_is_as_close_as_rounding(kind: Any) -> None:
    """Logits, keys and values of a piece, behind entries and not, about the sizes of its parts (48 rows of a product,
    96 queries, 128 entries) and the windows, on every instruction set; what lies beside the sequence stays."""
    torch.set_num_threads(2)
    model = Model(*kind, layers=2)
    for length, n, first in ((0, 1, 0), (0, 13, 0), (0, 49, 0), (5, 3, 4), (0, PROMPT, 0), (290, 35, 2), (133, 130, 0)):
        before = [[torch.cat([t, t[:, :, :1].expand(-1, -1, n + 2, -1)], 2) for t in each]
                  for each in model.caches(3, length)]  # fmt: skip
        tokens = torch.randint(0, VOCABULARY, (n,))
        positions, here = torch.arange(length, length + n) - first, slice(length, length + n)
        old = [[t[1:2, :, :length] for t in each] for each in before]
        exact, rounded = (
            stepped(model, *old, tokens, positions, first, r) for r in (exactly, lambda x: x.bfloat16().double())
        )
        for isa in lib.isas():
            keys, values = ([t.clone() for t in each] for each in before)
            cache = Cache.of(tuple(keys), tuple(values))
            y = prompt(model.c, cache, 1, length, tokens, positions, first, True, isa)
            assert y is not None
            pairs = [(y.double(), exact[0], rounded[0])]
            for which, each in enumerate((keys, values), 1):
                for i, t in enumerate(each):
                    pairs.append((t[1, :, here].double(), exact[which][i][0, :, here], rounded[which][i][0, :, here]))
                    t[1, :, here] = before[which - 1][i][1, :, here]
                    assert torch.equal(t, before[which - 1][i])
            for k, (ours, wanted, near) in enumerate(pairs):
                error, allowed = (float((t - wanted).norm() / wanted.norm()) for t in (ours, near))
                assert error <= 2.0 * allowed + 1e-4, f"{isa}, {k}: {n} tokens behind {length}: {error} > {allowed}"
            assert prompt(model.c, cache, 1, length, tokens, positions, first, False, isa) is None


def test_a_prompt_in_pieces_and_by_any_threads() -> None:
    """Bit for bit the same by any number of threads, and in pieces of no fewer rows than are multiplied as they are."""
    model = Model(*MODELS[0], layers=3)
    keys, values = model.caches(1, 300)
    tokens, positions = torch.randint(0, VOCABULARY, (200,)), torch.arange(100, 300)
    results = []
    for threads, pieces in ((1, [200]), (2, [200]), (5, [200]), (16, [200]), (2, [96, 104]), (3, [48, 55, 97])):
        torch.set_num_threads(threads)
        cache = Cache.of(tuple(k.clone() for k in keys), tuple(v.clone() for v in values))
        at = 100
        for n in pieces:
            here = slice(at - 100, at - 100 + n)
            logits = prompt(model.c, cache, 0, at, tokens[here], positions[here], 0, at + n == 300)
            at += n
        assert logits is not None
        results.append((logits, *cache.keys, *cache.values))
    for n, each in enumerate(results[1:], 1):
        same = [torch.equal(a, b) for a, b in zip(each, results[0], strict=True)]
        assert all(same), (n, same)


def test_prompt_refusals() -> None:
    model = Model(*MODELS[0], layers=1)
    keys, values = model.caches(2, 20)
    cache = Cache.of(tuple(keys), tuple(values))

    def call(length: int = 0, n: int = 3, token: int = 1, first: int = 0, sequence: int = 0) -> None:
        prompt(model.c, cache, sequence, length, torch.full((n,), token), torch.arange(n), first, True)

    call()
    for bad in ({"n": 22}, {"length": 19}, {"n": 241}, {"token": VOCABULARY}, {"token": -1}, {"first": 1}, {"n": 0},
                {"length": -1}, {"sequence": 2}):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            call(**bad)


def test_threads_do_not_change_the_result() -> None:
    model = Model(*MODELS[1], layers=3)
    keys, values = model.caches(3, 600)
    tokens, first = torch.tensor([3, 4, 5]), torch.tensor([0, 2, 5])
    results = []
    for threads in (1, 2, 5, 16):
        torch.set_num_threads(threads)
        for _ in range(5):
            cache = Cache.of(tuple(k.clone() for k in keys), tuple(v.clone() for v in values))
            results.append((decode(model.c, cache, 600, tokens, 600 - first, first), cache.keys[2], cache.values[2]))
    assert all(torch.equal(a, b) for each in results[1:] for a, b in zip(each, results[0], strict=True))


@pytest.mark.parametrize("isa", lib.isas())
@pytest.mark.parametrize("where", ["embedding", "cached key", "cached value"])
def test_what_is_no_number_stays_in_its_sequence(isa: str, where: str) -> None:
    model = Model(*MODELS[2], layers=2)
    keys, values = model.caches(3, 40)
    tokens, zero = torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.int64)

    def run() -> torch.Tensor:
        cache = Cache.of(tuple(k.clone() for k in keys), tuple(v.clone() for v in values))
        return decode(model.c, cache, 40, tokens, zero + 40, zero, isa)

    clean = run()
    assert torch.isfinite(clean).all()
    if where == "embedding":
        model.c.embedding[2, 5] = float("nan")
    elif where == "cached key":
        keys[1][1, 0, 7, 3] = float("nan")
    else:
        values[1][1, 0, 7] = float("nan")
    y = run()
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], clean[[0, 2]])


def test_inputs_are_int8_where_the_scheme_says_so() -> None:
    """As the layer's own kernel computes them: nearer to the step that rounds inputs so than to the exact one."""
    model = Model(*MODELS[5], layers=2)
    keys, values = model.caches(8, 30)
    tokens, zero = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    old = [[t[:, :, :30] for t in each] for each in (keys, values)]
    exact = model.step(*old, tokens, zero + 30, zero, exactly)
    rounded = model.step(*old, tokens, zero + 30, zero, lambda x: x.bfloat16().double())
    y = decode(model.c, Cache.of(tuple(keys), tuple(values)), 30, tokens, zero + 30, zero).double()
    assert (y - rounded).norm() < 0.85 * (rounded - exact).norm()
