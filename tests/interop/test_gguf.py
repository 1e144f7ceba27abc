"""Our GGUF files in llama.cpp: its logits, its perplexity, its tokens, and its own quantizer's choice of types."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from interop import clients
from interop.test_clients import rmse
from models import FAMILIES, make_model

import qkit
from qkit.formats.gguf.mixes import MIXES
from qkit.sources import open_source
from qkit.sources.gguf import GgufFile
from qkit.text.defaults import evaluation_text
from qkit.text.tokenizer import load_tokenizer

TEXTS = [
    "Hello world! It's 12345 o'clock.\n\n\tTabs  and   spaces", "Größe café naïve – “quotes” … €42", " leading", "",
    "日本語のテキスト 中文文本 한국어", "Привет мир, как дела? العربية हिन्दी ไทย", "a\u0301 ﬁ ½", "   ", "\n\n\n",
    "def f(x):\n    return x**2  # 🙂👍🏽\r\n",
]  # fmt: skip
# Real models: name -> (model, scheme, method).
REAL = {
    "smol-q4_k_m": ("smol", "q4_k_m", "imatrix"),
    "smol-q4_0": ("smol", "q4_0", "rtn"),
    "smol-iq4_xs": ("smol", "iq4_xs", "rtn"),
    "smol-mxfp4": ("smol", "mxfp4", "rtn"),
    "gemma-q6_k": ("gemma", "q6_k", "rtn"),
    "gemma-q4_k_m": ("gemma", "q4_k_m", "rtn"),
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
# Tiny ones, exported in float32: architecture, names, order of rows, rotation.
TINY = {
    **{family: (family, {}) for family in FAMILIES},
    "mistral": ("mistral", {"sliding_window": 128}),  # longer than the text: llama.cpp attends to everything
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
}


class Bench:
    """One run of llama.cpp over everything."""

    def __init__(self, root: Path):
        self.root = root
        self.out = clients.once(self._out)

    def _out(self) -> Path:
        folders, quantize = {}, []
        for name, (model, scheme, method) in REAL.items():
            source = "demo" if model == "smol" else str(clients.gemma())
            more = {"calib_samples": 8, "calib_len": 256} if method == "imatrix" else {}
            qkit.convert(source, self.root / name, format="gguf", scheme=scheme, method=method, **more)
            folders[name] = str(self.root / name)
        for name, (family, changes) in TINY.items():
            source = make_model(self.root / f"{name}-source", family, dtype=torch.float32, **changes)
            qkit.convert(source, self.root / name, format="gguf", scheme="none")
            folders[name] = str(self.root / name)
        for width in (256, 192):
            source = make_model(
                self.root / f"mix{width}-source", hidden_size=width, intermediate_size=512, num_hidden_layers=17,
                num_attention_heads=8, num_key_value_heads=2,
            )  # fmt: skip
            (exported,) = qkit.convert(source, self.root / f"mix{width}", format="gguf", scheme="none").out.glob(
                "*.gguf"
            )
            for mix, (_, number) in MIXES.items():
                if mix == "mxfp4":
                    continue
                quantize.append([str(exported), str(self.root / f"mix{width}-{mix}.gguf"), number])
        out = self.root / "out"
        out.mkdir()
        for model in ("smol", "gemma", "tiny"):
            mine = {n: f for n, f in folders.items() if REAL.get(n, ("tiny",))[0] == model}
            job = {"folders": mine, "tokens": self.tokens(model), "out": str(out), "texts": TEXTS}
            if model == "tiny":
                job["quantize"] = quantize
            print(clients.run("llamacpp", job, out))
        return out

    def tokens(self, model: str) -> list[list[int]]:
        if model == "tiny":
            return [list(range(row * 100, row * 100 + 96)) for row in (0, 1)]
        source = "demo" if model == "smol" else str(clients.gemma())
        tokenizer = load_tokenizer(source)
        ids = tokenizer(evaluation_text().content[:8000], add_special_tokens=False).input_ids
        rows = [ids[i * 256 : (i + 1) * 256] for i in range(2)]
        return [[tokenizer.bos_token_id, *row[1:]] for row in rows] if model == "gemma" else rows


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("gguf"))


def perplexity(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    scores = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    return float(scores.exp())


@pytest.mark.parametrize("name", REAL)
def test_same_logits_and_perplexity(name: str, bench: Bench) -> None:
    """llama.cpp rounds the inputs of every product to 8 bits, which is most of the distance: about three times what
    bfloat16 costs. Wrong values, names or orders are a hundred times farther."""
    theirs = torch.from_numpy(np.load(bench.out() / f"{name}.npy"))
    tokens = torch.tensor(bench.tokens(REAL[name][0]))
    with torch.inference_mode():
        exact, own = (
            qkit.load(bench.root / name, device="cpu", dtype=dtype)(tokens).logits.float()
            for dtype in ("float32", "bfloat16")
        )
    distance, rounding = rmse(theirs, exact), rmse(own, exact)
    a, b = perplexity(theirs, tokens), perplexity(exact, tokens)
    print(f"{name}: {distance:.4f}, bfloat16 {rounding:.4f}; perplexity {a:.3f} llama.cpp, {b:.3f} qkit")
    assert distance < 5 * rounding
    assert abs(a / b - 1) < 0.02
    assert float((theirs.argmax(-1) == exact.argmax(-1)).double().mean()) > 0.85
    assert rmse(theirs.roll(1, -1), exact) > 5 * rounding  # the bound can fail


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_computes_the_same(name: str, bench: Bench) -> None:
    theirs = torch.from_numpy(np.load(bench.out() / f"{name}.npy"))
    tokens = torch.tensor(bench.tokens("tiny"))
    with torch.inference_mode():
        exact = qkit.load(bench.root / f"{name}-source", device="cpu", dtype="float32")(tokens).logits
    exact = exact[..., : theirs.shape[-1]]  # Gemma's rows beyond the vocabulary are left out
    spread = float(exact.std())
    assert rmse(theirs, exact) < 0.01 * spread, (rmse(theirs, exact), spread)


@pytest.mark.parametrize("name", ["smol-q4_0", "gemma-q6_k"])
def test_llama_cpp_makes_the_same_tokens(name: str, bench: Bench) -> None:
    """Of a byte-level and of a SentencePiece vocabulary, in many scripts; BOS where the model wants it."""
    made = json.loads((bench.out() / f"{name}.tokens.json").read_text())
    tokenizer = load_tokenizer("demo" if name.startswith("smol") else str(clients.gemma()))
    for text, found in zip(TEXTS, made, strict=True):
        assert found["special"] == tokenizer(text).input_ids, text
        assert found["plain"] == tokenizer(text, add_special_tokens=False).input_ids, text


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "mxfp4"])  # which is ours: dense models too
@pytest.mark.parametrize("width", [256, 192])
def test_the_same_types_as_llama_quantize(mix: str, width: int, bench: Bench, tmp_path: Path) -> None:
    """Seventeen blocks, with rows that 256 divides and rows that it does not."""
    theirs = GgufFile(bench.out().parent / f"mix{width}-{mix}.gguf").tensors
    source = bench.root / f"mix{width}-source"
    (file,) = qkit.convert(source, tmp_path / "out", format="gguf", scheme=mix, method="rtn").out.glob("*.gguf")
    ours = GgufFile(file).tensors
    assert {n: i.type.name for n, i in ours.items()} == {n: i.type.name for n, i in theirs.items()}
    assert open_source(str(file)).stored.nbytes == sum(i.nbytes for i in theirs.values())
