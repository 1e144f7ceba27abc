"""Everything there is to check and time on the GPU that is present, in one run of at most ten minutes.

    python benchmarks/gpu.py [--out profiles] [--layers 32]

1. ceilings: device-to-device copy, bfloat16 matmul
2. correctness: dequantizing and the quantized matmul on the GPU against the CPU; a tiny model converted by GPTQ on
   both devices, loaded and generating on the GPU
3. conversion: GPTQ seconds per decoder block of Llama-3.1-8B's shape, GPU and this machine's CPU
4. serving through `qkit.load`: a Llama-3.1-8B-shaped model with random weights, bfloat16 and W4A16: resident memory,
   prefill and decode tokens/s at batch 1. There is no fused GPU kernel yet: a W4A16 linear dequantizes, then
   multiplies, and the figures say what that costs.

Writes one report (JSON and Markdown) named after the device; the last line of stdout is the same JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "tests"), str(Path(__file__).parent)]

LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def timed(run: Any, repeats: int = 20) -> float:
    """Median seconds of a GPU call, by events."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {
        "copy_gb_per_s": 2 * a.numel() / timed(lambda: b.copy_(a)) / 1e9,
        "bf16_matmul_tflops": 2 * 8192**3 / timed(lambda: x @ y) / 1e12,
    }


def check_kernels() -> dict[str, Any]:
    """Bit equality of dequantizing, and the matmul within twice the low-precision error."""
    from qkit.kernels import reference

    generator = torch.Generator().manual_seed(0)
    checked, worst = 0, 0.0
    for bits in (4, 8):
        for out, in_, groups in ((64, 256, 2), (96, 160, 5), (4096, 4096, 32), (40, 64, 1)):
            for symmetric in (True, False):
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    codes = torch.randint(0, 1 << bits, (out, in_), generator=generator, dtype=torch.uint8)
                    scale = (torch.rand(out, groups, generator=generator) * 0.01 + 0.001).to(dtype)
                    zero = None
                    if not symmetric:
                        zero = torch.randint(0, 1 << bits, (out, groups), generator=generator, dtype=torch.uint8)
                    here = reference.dequantize(codes, scale, zero, bits, dtype)
                    moved = [None if t is None else t.cuda() for t in (codes, scale, zero)]
                    there = reference.dequantize(*moved, bits, dtype)
                    assert torch.equal(here, there.cpu()), f"dequantize differs: {bits} bits, {out} x {in_}, {dtype}"
                    x = torch.randn(5, in_, generator=generator).to(dtype)
                    exact = x.double() @ here.double().t()
                    packed = reference.pack(codes, bits).cuda()
                    got = reference.matmul(x.cuda(), packed, moved[1], moved[2], bits).cpu().double()
                    low = (x.cuda() @ there.t()).cpu().double()
                    floor = max(float((low - exact).norm()), 1e-6 * float(exact.norm()))
                    worst = max(worst, float((got - exact).norm()) / floor)
                    checked += 1
    assert worst <= 2, f"matmul error is {worst:.2f} times the low-precision error"
    return {"cases": checked, "worst_error_over_low_precision": worst}


def check_conversion(work: Path) -> dict[str, Any]:
    """GPTQ on the GPU and on the CPU: about the same error; the result loads and generates on the GPU."""
    from models import make_model

    import qkit

    source = make_model(work / "tiny")
    errors = {}
    for device in ("cpu", "cuda"):
        out = work / f"tiny-{device}"
        qkit.convert(str(source), out, method="gptq", device=device, calib_samples=8, calib_len=64)
        tensors = json.loads((out / "qkit_manifest.json").read_text())["tensors"].values()
        errors[device] = statistics.mean(t["output_error"] for t in tensors)
    assert abs(errors["cuda"] - errors["cpu"]) < 0.1 * errors["cpu"], errors
    tokens = torch.arange(20).view(1, -1)
    cpu = qkit.load(str(work / "tiny-cuda"), device="cpu", dtype="float32")(tokens).logits
    model = qkit.load(str(work / "tiny-cuda"), device="cuda", dtype="float32")
    gpu = model(tokens.cuda()).logits.cpu()
    difference = float((gpu - cpu).norm() / cpu.norm())
    assert difference < 1e-2, difference  # TF32 is off by default: rounding order only
    text = model.generate(tokens.cuda(), max_new_tokens=8, do_sample=False)
    assert text.shape[1] > 20
    return {"mean_output_error": errors, "logits_cuda_against_cpu": difference}


class RandomSource:
    """A Llama-shaped checkpoint whose tensors are made when read: nothing to write, nothing to fetch."""

    label = base_model = "Llama-3.1-8B shape, random weights"
    sidecars = ()
    fingerprint = "random"

    def __init__(self, layers: int):
        from qkit.dtypes import TensorMeta

        c = LLAMA_8B
        self.config = {**c, "num_hidden_layers": layers}
        hidden, wide, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (c["vocab_size"], hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (c["vocab_size"], hidden),
        }
        for i in range(layers):
            prefix = f"model.layers.{i}."
            shapes |= {
                f"{prefix}{name}.weight": shape
                for name, shape in {
                    "input_layernorm": (hidden,),
                    "post_attention_layernorm": (hidden,),
                    "self_attn.q_proj": (hidden, hidden),
                    "self_attn.k_proj": (kv, hidden),
                    "self_attn.v_proj": (kv, hidden),
                    "self_attn.o_proj": (hidden, hidden),
                    "mlp.gate_proj": (wide, hidden),
                    "mlp.up_proj": (wide, hidden),
                    "mlp.down_proj": (hidden, wide),
                }.items()
            }
        self._metas = {name: TensorMeta("BF16", shape) for name, shape in shapes.items()}

    def names(self) -> list[str]:
        return list(self._metas)

    def meta(self, name: str) -> Any:
        return self._metas[name]

    def read(self, name: str) -> torch.Tensor:
        shape = self._metas[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator("cuda").manual_seed(len(name) + shape[0])
        return (torch.randn(shape, generator=generator, device="cuda") * 0.02).bfloat16().cpu()


def gptq_seconds(layers: int = 2, samples: int = 128, length: int = 512) -> dict[str, Any]:
    """Seconds of GPTQ per decoder block on the GPU, its calibration in host memory."""
    from qkit.calibrate.blocks import quantize_blocks

    from qkit.choose import left_alone
    from qkit.scheme import Scheme

    source = RandomSource(layers)
    schemes = {n: Scheme() for n in source.names() if left_alone(n, source.meta(n)) is None}
    tokens = torch.randint(0, 128000, (samples, length), generator=torch.Generator().manual_seed(0))
    marks = [time.perf_counter()]
    for _ in quantize_blocks(source, schemes, tokens, device="cuda"):
        marks.append(time.perf_counter())
    per_block = marks[-1] - marks[-2]
    return {
        "calibration_tokens": samples * length,
        "seconds_per_block": per_block,
        "seconds_for_32_blocks": 32 * per_block,
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(),
    }


def serving(layers: int) -> dict[str, Any]:
    """bfloat16 and W4A16 through qkit.load, the same random weights."""
    from table import speed

    import qkit
    from qkit.quantize import rtn
    from qkit.runtime import QuantLinear
    from qkit.scheme import Scheme

    rows = {}
    model = qkit.load(RandomSource(layers), device="cuda")
    for row in ("bf16", "w4a16 g128"):
        if row != "bf16":
            for block in model.model.layers:
                for parent in (block.self_attn, block.mlp):
                    for name, linear in list(parent.named_children()):
                        if isinstance(linear, torch.nn.Linear):
                            q = rtn.quantize(linear.weight.cpu(), Scheme())
                            setattr(parent, name, QuantLinear.from_qtensor(q).to("cuda"))
            torch.cuda.empty_cache()
        weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        torch.cuda.reset_peak_memory_stats()
        rows[row] = {
            "weight_bytes": weights,
            **speed(model),
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("profiles"))
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here\nhint: this benchmark measures the GPU that is present")
    import qkit

    device = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "schema_version": 1,
        "kind": "gpu-bench",
        "device": device.name,
        "memory_bytes": device.total_memory,
        "compute_capability": f"{device.major}.{device.minor}",
        "date": datetime.date.today().isoformat(),
        "versions": {"qkit": qkit.__version__, "torch": torch.__version__, "cuda": torch.version.cuda},
        "command": "python benchmarks/gpu.py",
    }
    with tempfile.TemporaryDirectory() as work:
        for name, step in (
            ("ceilings", ceilings),
            ("kernels", check_kernels),
            ("conversion", lambda: check_conversion(Path(work))),
            ("gptq", gptq_seconds),
            ("serving", lambda: serving(args.layers)),
        ):
            started = time.perf_counter()
            report[name] = step()
            print(f"{name}: {time.perf_counter() - started:.1f} s {json.dumps(report[name])}", flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"gpu-{slug}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"gpu-{slug}.md").write_text(markdown(report))
    print(json.dumps(report))


def markdown(r: dict[str, Any]) -> str:
    lines = [
        f"# {r['device']}, measured {r['date']}",
        "",
        f"`{r['command']}` (qkit {r['versions']['qkit']}, torch {r['versions']['torch']}). Every figure is measured.",
        "",
        f"Ceilings: copy {r['ceilings']['copy_gb_per_s']:.0f} GB/s, "
        f"bfloat16 matmul {r['ceilings']['bf16_matmul_tflops']:.0f} TFLOP/s.",
        "",
        f"Correctness: {r['kernels']['cases']} dequantize and matmul cases agree with the CPU; GPTQ of a tiny model has "
        f"mean relative output error {r['conversion']['mean_output_error']['cuda']:.4f} on the GPU and "
        f"{r['conversion']['mean_output_error']['cpu']:.4f} on the CPU.",
        "",
        f"GPTQ, Llama-3.1-8B shape, {r['gptq']['calibration_tokens']} tokens: "
        f"{r['gptq']['seconds_per_block']:.1f} s per decoder block, "
        f"peak {r['gptq']['peak_gpu_memory_bytes'] / 1e9:.1f} GB of GPU memory.",
        "",
        "| Llama-3.1-8B shape, `qkit.load`, batch 1 | weights | peak GPU memory | prefill tok/s (512) | decode tok/s |",
        "|---|---|---|---|---|",
    ]
    for name, row in r["serving"].items():
        lines.append(
            f"| {name} | {row['weight_bytes'] / 1e9:.2f} GB | {row['peak_gpu_memory_bytes'] / 1e9:.2f} GB "
            f"| {row['prefill_tokens_per_s']:.0f} | {row['decode_tokens_per_s']:.1f} |"
        )
    lines += ["", "W4A16 on a GPU dequantizes each layer before multiplying: there is no fused kernel yet.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
