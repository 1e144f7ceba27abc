"""Our folders in the real clients: the same logits as qkit's own load, within the low-precision bound.

The bound: a client's bfloat16 logits are at most twice as far (RMSE) from the float32 logits of the same
dequantized weights as qkit's own bfloat16 logits are. A folder read with wrong zeros, scales or order is tens of
times farther; every case also checks that another folder's logits fail it.

A client that cannot be installed is a failure; where no package index can be reached at all, a skip.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from interop import clients
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import qkit
from qkit.hardware.detect import cpu
from qkit.models import kv_cache
from qkit.runtime import QuantLinear, load_tokenizer
from qkit.text.defaults import evaluation_text

SEQUENCES, LENGTH = 2, 64
# What "mixed" is: layers of 8 bits, a block that is kept, and the rest at 4 bits.
MIXED = "- {modules: '*.down_proj', scheme: w8a16}\n- {modules: 'model.layers.0.*', scheme: keep}\n"
# What "w4a16, FP8 KV cache" is: a scheme, and the cache's scales calibrated on a little text.
CACHE = ", FP8 KV cache"
HEAD = ", head of 4 bits"
# name -> (model, format, scheme, group size); 0 is one scale per output channel
FOLDERS = {
    "smol-ct-w4": ("smol", "compressed-tensors", "w4a16", 64),
    "smol-ct-w4-asym": ("smol", "compressed-tensors", "w4a16-asym", 64),
    "smol-ct-w8": ("smol", "compressed-tensors", "w8a16", 0),
    "smol-gptq-w4": ("smol", "gptq", "w4a16", 64),
    "smol-gptq2-w4": ("smol", "gptq_v2", "w4a16", 64),
    "smol-gptq2-w4-asym": ("smol", "gptq_v2", "w4a16-asym", 64),
    "smol-gptq-w8": ("smol", "gptq", "w8a16", 32),
    "smol-gptq-w3": ("smol", "gptq", "w3a16", 32),
    "smol-gptq2-w2-asym": ("smol", "gptq_v2", "w2a16-asym", 32),
    "gemma-ct-w4": ("gemma", "compressed-tensors", "w4a16", 128),
    "gemma-gptq-w4": ("gemma", "gptq", "w4a16", 128),
    "smol-ct-mixed": ("smol", "compressed-tensors", "mixed", 64),
    "smol-gptq-mixed": ("smol", "gptq", "mixed", 64),
    "smol-ct-w4-kv": ("smol", "compressed-tensors", "w4a16" + CACHE, 64),
    "gemma-ct-w4-kv": ("gemma", "compressed-tensors", "w4a16" + CACHE, 128),
    "smol-ct-w4-head": ("smol", "compressed-tensors", "w4a16" + HEAD, 64),
    "smol-gptq-w4-head": ("smol", "gptq", "w4a16" + HEAD, 64),
    "smol-ct-w8-lora": ("smol", "compressed-tensors", "w8a16", 0),  # with an adapter while it is served
    "smol-ct-w8a8": ("smol", "compressed-tensors", "w8a8", None),
    "smol-ct-fp8": ("smol", "compressed-tensors", "fp8", None),
    "smol-ct-nvfp4": ("smol", "compressed-tensors", "nvfp4a16", None),
    "smol-ct-mxfp4": ("smol", "compressed-tensors", "mxfp4a16", None),
    "smol-awq-w4": ("smol", "awq", "w4a16-asym", 64),
    "gemma-awq-w4": ("gemma", "awq", "w4a16", 128),
}
# What transformers' compressed-tensors has no CPU kernel for, or rounds inputs for: its own code dequantizes these.
_FLOATS = ("smol-ct-w8a8", "smol-ct-fp8", "smol-ct-nvfp4", "smol-ct-mxfp4")
# (client, script or None for its own, folders): one process each, for each model.
RUNS = {
    "compressed-tensors": (
        "compressed-tensors", None, ("smol-ct-w4", "smol-ct-w4-asym", "smol-ct-w8", "smol-ct-mixed", "smol-ct-w4-head",
                                     "gemma-ct-w4", "smol-ct-w4-kv", "gemma-ct-w4-kv", *_FLOATS),
    ),
    "compressed-tensors-0.17": (
        "vllm", "client_transformers.py", ("smol-ct-w4", "smol-ct-w4-asym", "gemma-ct-w4", "smol-ct-w4-kv", *_FLOATS),
    ),
    "gptqmodel": (
        "gptqmodel", None, ("smol-gptq-w4", "smol-gptq2-w4", "smol-gptq2-w4-asym", "smol-gptq-w8", "smol-gptq-w3",
                            "smol-gptq2-w2-asym", "smol-gptq-mixed", "smol-gptq-w4-head", "gemma-gptq-w4",
                            "smol-awq-w4", "gemma-awq-w4"),
    ),
    "gptqmodel-in-transformers": (
        "gptqmodel", "client_transformers.py", ("smol-gptq-w4", "smol-gptq2-w4-asym", "smol-awq-w4"),
    ),
    # vLLM's CPU build has kernels for 4 bits, and reads symmetric GPTQ only.
    "vllm": ("vllm", None, ("smol-ct-w4", "smol-ct-w4-asym", "smol-gptq-w4", "gemma-ct-w4", "gemma-gptq-w4",
                            "smol-ct-w8a8", "smol-awq-w4", "smol-ct-w4-head", "smol-gptq-w4-head", "smol-ct-w4-kv")),
    # The same vLLM with qkit installed: 8 bits too. With torch.compile: test_vllm_compiled.py.
    "vllm with qkit": ("vllm", None, ("smol-ct-w8", "smol-ct-w8-lora")),
}  # fmt: skip
CASES = [(run, name) for run, (_, _, names) in RUNS.items() for name in names]
CACHES = [case for case in CASES if case[1].endswith("-kv")]
COMPILED: dict[str, tuple[str, ...]] = {}  # the others run eagerly


class Bench:
    """Converted folders, qkit's own logits and the clients' results, each made once."""

    def __init__(self, root: Path):
        self.root = root
        self.folder = clients.once(self._folder)
        self.tokens = cache(self._tokens)
        self.adapter = cache(self._adapter)
        self.own = cache(self._own)
        self.results = clients.once(self._results)
        self.site = cache(lambda: clients.install_qkit(root / "site"))

    def _folder(self, name: str) -> Path:
        model, fmt, scheme, group_size = FOLDERS[name]
        source = "demo" if model == "smol" else str(clients.gemma())
        out = self.root / name
        recipe = self.root / "mixed.yaml" if scheme == "mixed" else None
        if recipe is not None:
            recipe.write_text(MIXED)
        bare = scheme.removesuffix(CACHE).removesuffix(HEAD)
        named = {"recipe": recipe} if recipe is not None else {"scheme": bare}
        if scheme.endswith(HEAD):
            named["head"] = "4bit"
        if scheme.endswith(CACHE):
            named |= {"kv_cache": "fp8", "calib_samples": 8, "calib_len": 128}
        if group_size is not None:
            named["group_size"] = group_size
        qkit.convert(source, out, format=fmt, method="rtn", **named)
        return out

    def _tokens(self, model: str) -> list[list[int]]:
        """SEQUENCES x LENGTH ids of English prose, BOS in place of each first where the model has one."""
        tokenizer = load_tokenizer(self.folder(next(n for n, f in FOLDERS.items() if f[0] == model)))
        ids = tokenizer(evaluation_text().content[:4000], add_special_tokens=False).input_ids
        rows = [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(SEQUENCES)]
        bos = tokenizer.bos_token_id
        return [[bos, *row[1:]] for row in rows] if model == "gemma" else rows

    def _own(self, name: str, inputs: str = "kernels") -> tuple[torch.Tensor, torch.Tensor]:
        """(float32, bfloat16) logits of qkit's own load. inputs of quantized layers: as the "kernels" take them, or
        "plain", or "rounded" as the scheme says, in the way of compressed-tensors; or, of a KV cache in FP8, what goes
        into it "truncated"."""
        tokens = torch.tensor(self.tokens(FOLDERS[name][0]))
        results = []
        for dtype in ("float32", "bfloat16"):
            model = qkit.load(self.folder(name), device="cpu", dtype=dtype)
            for module in model.modules() if inputs in ("plain", "rounded") else ():
                if isinstance(module, QuantLinear):
                    if inputs == "rounded" and module.activations is not None:
                        module.register_forward_pre_hook(rounded(module.activations))
                    module.activations = None
                    module._expand()  # the kernel was chosen as the model was loaded
            if name.endswith("-lora"):
                model = PeftModel.from_pretrained(model, self.adapter(), config=qkit.lora(self.adapter()))
            with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
                if inputs == "truncated":
                    patch.setattr(kv_cache, "rounded", truncated)
                results.append(model(tokens).logits.float())
        return results[0], results[1]

    def _adapter(self) -> Path:
        """Adds to two linears of every block of SmolLM2."""
        folder = self.root / "adapter"
        folder.mkdir()
        seeded = torch.Generator().manual_seed(0)
        tensors = {}
        for block in range(30):
            for module, inputs in (("self_attn.q_proj", 576), ("mlp.down_proj", 1536)):
                name = f"base_model.model.model.layers.{block}.{module}"
                tensors[f"{name}.lora_A.weight"] = 0.02 * torch.randn(8, inputs, generator=seeded)
                tensors[f"{name}.lora_B.weight"] = 0.05 * torch.randn(576, 8, generator=seeded)
        save_file(tensors, folder / "adapter_model.safetensors")
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"]).save_pretrained(folder)
        return folder

    def path(self, run: str, name: str) -> Path:
        if run == "vllm":
            clients.needs_vllm_kernels()
        return self.results(run)[name]

    def _results(self, run: str) -> dict[str, Path]:
        client, script, names = RUNS[run]
        results: dict[str, Path] = {}
        for model in dict.fromkeys(FOLDERS[n][0] for n in names):
            mine = [n for n in names if FOLDERS[n][0] == model]
            out = self.root / run / model
            out.mkdir(parents=True)
            job = {
                "folders": {n: str(self.folder(n)) for n in mine},
                "tokens": self.tokens(model),
                "out": str(out),
                # transformers' compressed path lays zero points out unpacked and so refuses everybody's
                # asymmetric folders; its dequantizing path reads them.
                "dequantize": [n for n in mine if "-ct-" in n and (n.endswith("asym") or n in _FLOATS)],
                # In bfloat16 keys are a little off, and fall to other values of e4m3: no bound would be sharp.
                "float32": [n for n in mine if n.endswith("-kv")],
                "adapters": {n: str(self.adapter()) for n in mine if n.endswith("-lora")},
                "compile": [n for n in mine if n in COMPILED.get(run, ())],
            }
            extra = {"PYTHONPATH": str(self.site())} if "qkit" in run else {}
            extra |= {"QKIT_VLLM": "0"} if run.endswith("off") else {}
            print(clients.run(client, job, out, script, extra))
            for n in mine:
                results[n] = out / (f"{n}.json" if client_is_vllm(run) else f"{n}.npy")
        return results


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("interop"))


def rounded(kind: str):
    """A hook that rounds a layer's input per token, to integers of 8 bits or to FP8 (compressed-tensors,
    quantization/utils/helpers.py: calculate_qparams)."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = args[0].float()
        scale = x.abs().amax(-1, keepdim=True) / (127.5 if kind == "int8" else 448.0)
        scaled = x / scale.clamp(min=1e-12)
        codes = scaled.round().clamp(-128, 127) if kind == "int8" else scaled.to(torch.float8_e4m3fn).float()
        return ((codes * scale).to(args[0].dtype),)

    return hook


def truncated(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 by leaving bits off: how vLLM 0.32 writes its cache on CPUs (cpu_attn_reshape_and_cache: every one of 4096
    codes is this, and 716 are not the nearest). On GPUs it rounds to the nearest."""
    scaled = (x.float() / scale.float()).clamp(-448, 448)
    codes = scaled.to(torch.float8_e4m3fn)
    beyond = codes.float().abs() > scaled.abs()
    codes = (codes.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn)
    return (codes.float() * scale.float()).to(x.dtype)


def client_is_vllm(run: str) -> bool:
    """It gives probabilities of chosen tokens, not logits."""
    return run.startswith("vllm")


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


def chosen(logits: torch.Tensor, tokens: list[list[int]]) -> torch.Tensor:
    """Log-probability of each token from the second on: [SEQUENCES, LENGTH - 1]."""
    following = torch.tensor(tokens)[:, 1:, None]
    return logits[:, :-1].log_softmax(-1).gather(-1, following).squeeze(-1)


@pytest.mark.parametrize(("run", "name"), [case for case in CASES if case not in CACHES or client_is_vllm(case[0])])
def test_same_logits_as_qkit(run: str, name: str, bench: Bench, request: pytest.FixtureRequest) -> None:
    if run == "vllm" and "amx_tile" in cpu().features:
        # Seen with vLLM 0.32: relative error 0.32 where 0.12 is allowed, for all five folders, and the same for what
        # qkit 0.1 wrote; they agree in transformers or gptqmodel in the same run. On AVX-512 vLLM agrees too.
        request.applymarker(pytest.mark.xfail(reason="vLLM's own 4-bit kernels are less exact on AMX", strict=False))
    model = FOLDERS[name][0]
    tokens = bench.tokens(model)
    inputs = "kernels"
    if name in _FLOATS and not client_is_vllm(run):  # transformers 5.19, which is with 0.17, still rounds them
        inputs = "rounded" if run.endswith("0.17") else "plain"
    if (run, name) in CACHES:
        inputs = "truncated"
    exact, own = bench.own(name, inputs)
    path = bench.path(run, name)
    other = None
    if name.endswith("-lora"):
        other = name.removesuffix("-lora")
    elif model == "smol":
        scheme = FOLDERS[name][2].removesuffix(CACHE)
        other = next(n for n, f in FOLDERS.items() if f[0] == model and f[2] != scheme)
    if client_is_vllm(run):
        rows = torch.tensor(json.loads(path.read_text()), dtype=torch.float64)
        theirs, likeliest = rows[..., 0], rows[..., 1].long()
        agreement = float((likeliest == exact[:, :-1].argmax(-1)).double().mean())
        own_agreement = float((own[:, :-1].argmax(-1) == exact[:, :-1].argmax(-1)).double().mean())
        assert agreement >= own_agreement - 0.1  # near ties fall either way
        exact, own = chosen(exact, tokens), chosen(own, tokens)
    else:
        theirs = torch.from_numpy(np.load(path))
    distance, allowed = rmse(theirs, exact), 2 * rmse(own, exact)
    print(f"{run} {name}: {distance:.5f}, qkit {allowed / 2:.5f}")
    assert distance <= allowed
    if other is not None:  # the bound can fail
        wrong = bench.own(other)[0]
        assert rmse(theirs, chosen(wrong, tokens) if client_is_vllm(run) else wrong) > allowed


@pytest.mark.parametrize(("run", "name"), [case for case in CASES if case[0].startswith("vllm")])
def test_which_kernels_serve_vllm(run: str, name: str, bench: Bench) -> None:
    path = bench.path(run, name)
    kinds = json.loads(path.with_suffix(".kernels.json").read_text())
    linears = 30 * 4 if name.startswith("smol") else 18 * 4  # of each layer: qkv, o, gate and up, down
    assert sum(kinds.values()) == linears
    ours = {kind for kind in kinds if kind.startswith("qkit ")}
    assert ours == (set(kinds) if run == "vllm with qkit" else set())
    assert "qkit reference" not in ours


@pytest.mark.parametrize(("run", "name"), CACHES)
def test_the_cache_is_rounded_as_by_qkit(run: str, name: str, bench: Bench) -> None:
    """vLLM keeps FP8, by the scales of the folder. transformers has those scales and, in the first layer, where nothing
    is rounded before, the very keys and values; its logits are closer to ours than ours without rounding. From layer to
    layer the last bits of sums decide between neighbours of e4m3: logits are no closer than that."""
    path = bench.path(run, name)
    stored = {n: t for file in bench.folder(name).glob("*.safetensors") for n, t in load_file(file).items()}
    modules = [f"model.layers.{i}.self_attn" for i in range(sum(n.endswith("self_attn.k_scale") for n in stored))]
    scales = [[float(stored[f"{m}.k_scale"]), float(stored[f"{m}.v_scale"])] for m in modules]
    if client_is_vllm(run):
        assert json.loads(path.with_suffix(".cache.json").read_text()) == [["fp8", *pair] for pair in scales]
        return
    theirs = np.load(path.with_suffix(".cache.npz"))
    assert theirs["scales"].tolist() == scales
    model = qkit.load(bench.folder(name), device="cpu", dtype="float32")
    with torch.inference_mode():
        first = model(torch.tensor(bench.tokens(FOLDERS[name][0])), use_cache=True).past_key_values.layers[0]
    for found, own in ((theirs["keys"], first.keys), (theirs["values"], first.values)):
        assert float((torch.from_numpy(found) == own).double().mean()) > 0.999
    exact, plain = bench.own(name)[0], bench.own(name.removesuffix("-kv"))[0]
    distance, effect = rmse(torch.from_numpy(np.load(path)), exact), rmse(plain, exact)
    print(f"{run} {name}: {distance:.5f}; without rounding {effect:.5f}")
    assert distance < 0.75 * effect
