"""Memory by part: figures worked out by hand, what engines divide among devices, and what must never shrink."""

from __future__ import annotations

import pytest
from shapes import shape

from qkit.errors import QkitError
from qkit.estimate.cache import Setting, kv_bytes
from qkit.estimate.memory import memory, sizes
from qkit.estimate.sequence import Sequence
from qkit.estimate.serving import ENGINES, Serving, batch_defaults, problem, usable
from qkit.estimate.sharding import attention_share, held, padding
from qkit.estimate.weights import of_architecture
from qkit.hardware.catalogue import parse
from qkit.hardware.device import GIB, Device, Target

MODELS = ("Llama-3.1-8B", "Qwen2.5-0.5B", "Gemma-3-27B", "Mixtral-8x7B", "gpt-oss-20b", "DeepSeek-V2-Lite")


def gpu(gib: float = 80.0, name: str = "card", **more) -> Device:
    given = {"vendor": "NVIDIA", "kind": "gpu", "capability": "9.0", **more}
    return Device(name, name, given.pop("vendor"), "", given.pop("kind"), (), gib, gib, 1000.0, **given)


def test_llama_8b_in_vllm_by_hand():
    arch = shape("Llama-3.1-8B")
    found = memory(arch, of_architecture(arch), Target(gpu(24.0)), "vllm", 8192, 2)
    rotations = 131072 * 128 * 2
    assert found.of("weights") == 8_030_261_248 * 2 + rotations
    assert found.of("KV cache") == 2 * 8192 * 32 * 2 * 8 * 128 * 2
    # 2,048 tokens of a step: gate, up and their product of 14,336, and three times the stream, in two bytes.
    activations = 2048 * (3 * 14336 + 3 * 4096) * 2
    assert found.of("activations") == activations
    assert found.of("logits") == 256 * 128256 * 18 + 2048 * 4096 * 2 - activations
    assert found.of("CUDA graphs") == 32 * 16 << 20
    assert found.total == sum(term.nbytes for term in found.terms)
    assert all(term.basis.startswith(("formula: ", "published logs: ", "assumed: ")) for term in found.terms)
    assert "2,048 tokens of a step x 55,296 values" in found.terms[2].basis


def test_llama_cpp_by_hand():
    """Of a GGUF file the table of tokens stays with the CPU; the compute buffer is that of the logits."""
    arch = shape("Llama-3.1-8B")
    weights = of_architecture(arch, "q4_k_m", "gguf")
    found = memory(arch, weights, Target(gpu()), "llama.cpp", 1000, 1, "Q8_0")
    assert found.of("weights") == weights.total - 128256 * 4096 // 256 * 144
    assert found.of("KV cache") == 1024 * 32 * 2 * 8 * 128 * 34 // 32  # cells in steps of 256
    assert found.of("activations") + found.of("logits") == 512 * (128256 + 4096) * 4  # 258.50 MiB, as its logs say
    plain = memory(arch, weights, Target(gpu()), "llama.cpp", 8192, 1, serving=Serving(flash_attention=False))
    flash = memory(arch, weights, Target(gpu()), "llama.cpp", 8192, 1)
    assert plain.of("activations") - flash.of("activations") == 32 * 512 * 8192 * 4
    shared = memory(arch, weights, Target(gpu(vendor="Apple", kind="unified")), "llama.cpp", 1000)
    assert shared.of("weights") == weights.total and shared.of("runtime") == 0


def test_transformers_by_hand():
    arch = shape("Llama-3.1-8B")
    found = memory(arch, of_architecture(arch), Target(gpu()), "transformers", 4096, 3)
    assert found.of("weights") == 8_030_261_248 * 2
    assert found.of("activations") == 3 * 4096 * (3 * 14336 + 3 * 4096) * 2
    assert found.of("logits") == 3 * 128256 * (2 + 4 + 4)
    cpu, ours = (memory(arch, of_architecture(arch), Target(gpu(64.0, kind="cpu")), engine, 4096, 3)
                 for engine in ("transformers", "qkit"))  # fmt: skip
    assert cpu.of("logits") == 3 * 128256 * (2 + 4 + 4 + 4096 * 2)  # torch copies the head once a sequence
    assert ours.of("logits") == found.of("logits")  # but not where its input is laid out for it
    assert cpu.as_list()[0] == {"name": "weights", "bytes": 8_030_261_248 * 2, "basis": "formula: all tensors"}


def test_tensor_parallel_divides_linears_and_pads_the_vocabulary():
    arch = shape("Qwen2.5-0.5B")  # 14 heads, 2 KV heads, tied, a vocabulary that 64 divides
    weights = of_architecture(arch)
    one, two = (held(arch, weights, "vllm", n).nbytes for n in (1, 2))
    norms = weights.of_class("norm", "router", "other")
    rotations = 131072 * 64 * 2
    assert one == weights.total + rotations
    assert two == (weights.total - norms) // 2 + norms + rotations
    odd = shape("Llama-2-7B")
    assert odd.vocab == 32000 and held(odd, of_architecture(odd), "vllm", 1).nbytes == 6_738_415_616 * 2 + 131072 * 256


def test_kv_heads_are_replicated_where_there_are_fewer_than_ranks():
    arch = shape("Llama-3.1-8B")  # 8 KV heads
    assert attention_share(arch, 8) == 1 / 8
    q_and_o, k_and_v = 2 * 4096 * 4096, 2 * 4096 * 1024
    assert attention_share(arch, 16) == pytest.approx((q_and_o / 16 + k_and_v / 8) / (q_and_o + k_and_v))
    weights = of_architecture(arch)
    kv = [memory(arch, weights, Target(gpu(), n), "vllm", 4096).of("KV cache") for n in (1, 8, 16)]
    assert kv == [4096 * 131072, 4096 * 131072 // 8, 4096 * 131072 // 8]


def test_mla_keeps_its_latent_on_every_rank_and_decodes_with_a_second_kv_b_proj():
    arch = shape("DeepSeek-V3")
    kv = [memory(arch, of_architecture(arch), Target(gpu(), n), "vllm", 4096).of("KV cache") for n in (1, 8)]
    assert kv == [61 * 576 * 2 * 4096] * 2
    up = 61 * 512 * 128 * 256
    plain, quantized = of_architecture(arch), of_architecture(arch, "w4a16", "compressed-tensors")
    rotations = 131072 * 64 * 2
    assert held(arch, plain, "vllm", 1).nbytes == plain.total - plain.of_class("mtp") + rotations
    assert held(arch, quantized, "vllm", 1).nbytes == quantized.total - quantized.of_class("mtp") + rotations + 2 * up


def test_experts_in_mxfp4_are_padded_as_marlin_wants_them():
    arch = shape("gpt-oss-20b")  # experts of 2,880 x 2,880
    weights = of_architecture(arch, "mxfp4a16", "mxfp4")
    coded = sum(p.nbytes for p in weights.parts if p.role == "expert" and p.quantized)
    assert coded == 24 * 32 * 3 * 2880 * (2880 // 2 + 2880 // 32)
    for tp, width in ((1, 2944), (2, 1536), (8, 384)):  # of a rank, in 128s
        assert padding(arch, weights, tp) == coded * tp * width * 3072 // 2880**2 - coded
    assert padding(arch, of_architecture(arch), 1) == 0
    fits = shape("Mixtral-8x7B")  # 14,336 x 4,096
    assert padding(fits, of_architecture(fits, "mxfp4a16", "compressed-tensors"), 2) == 0
    assert padding(fits, of_architecture(fits, "w4a16", "compressed-tensors"), 64) == 0


def test_layers_are_divided_whole():
    arch = shape("Llama-3.1-8B")
    weights = of_architecture(arch, "q8_0", "gguf")
    body = weights.total - weights.of_class("embedding", "head")
    three = held(arch, weights, "llama.cpp", 3).nbytes  # 33 with the head: 11 each, or 10 and the head
    assert three == max(-(-body * 11 // 32), -(-body * 10 // 32) + weights.of_class("head"))
    found = memory(arch, weights, Target(gpu(), 3), "llama.cpp", 256)
    assert found.of("KV cache") == 256 * 131072 * 11 // 32


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_more_is_never_less(name, engine):
    arch = shape(name)
    weights = of_architecture(arch)
    one = Target(gpu())

    def total(context: int, batch: int, target: Target = one) -> int:
        return memory(arch, weights, target, engine, context, batch).total

    by_context = [total(n, 2) for n in (1, 16, 17, 255, 256, 257, 1000, 4096, 5000, 32768, 131072)]
    assert by_context == sorted(by_context)
    by_batch = [total(3000, n) for n in (1, 2, 3, 16, 255, 256, 257, 1000, 2000)]
    assert by_batch == sorted(by_batch) and by_batch[-1] > by_batch[0]
    parts = [memory(arch, weights, Target(gpu(), n), engine, 4096) for n in (1, 2, 4, 8)]
    for name in ("weights", "KV cache", "activations"):
        assert [p.of(name) for p in parts] == sorted((p.of(name) for p in parts), reverse=True)


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "transformers"])
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_is_what_the_cache_says(name, dtype, engine):
    """The quick sum over layers that are alike, against the sum over all of them."""
    arch = shape(name)
    setting = Setting(tp=2 if engine == "vllm" else 1, in_flight=2048)
    quick = Sequence(arch, dtype, engine, setting)
    for tokens in (1, 16, 1000, 1024, 1025, 4096, 5000, 100_000):
        assert quick.nbytes(tokens) == kv_bytes(arch, tokens, 1, dtype, engine, setting)


def test_usable_memory():
    card = gpu(80.0)
    assert usable(Target(card), "vllm")[0] == int(80 * GIB * 0.92)
    assert usable(Target(card), "vllm", Serving(utilization=0.5))[0] == 40 * GIB
    assert usable(Target(card), "llama.cpp")[0] == 79 * GIB
    assert usable(Target(card), "transformers")[0] == 76 * GIB
    mac = parse("m3-max-40c")[0]
    assert usable(mac, "llama.cpp")[0] == mac.device.memory_bytes < mac.device.memory_gib * GIB
    assert usable(Target(gpu(64.0, kind="cpu")), "llama.cpp")[0] == int(64 * GIB * 0.95)
    assert usable(parse("epyc-9654")[0], "llama.cpp") == (None, "the memory of the device is not known")


def test_the_step_of_vllm_follows_the_device():
    tiers = {"rtx-4090": (2048, 256), "a100-80g-sxm": (2048, 256), "h100-sxm": (8192, 1024), "b200": (16384, 1024)}
    for name, expected in tiers.items():
        assert batch_defaults(parse(name)[0].device) == expected
    assert batch_defaults(gpu(128.0, "GB10 of a desk", kind="unified")) == (2048, 256)
    assert batch_defaults(gpu(64.0, kind="cpu"), 2) == (4096, 256)


def test_what_does_not_run_at_all():
    assert "divide 40 attention heads by 3" in problem(Target(gpu(), 3), "vllm", 40)
    assert problem(Target(gpu(), 2), "vllm", 40) == ""
    assert "7.5" in problem(Target(gpu(capability="6.1")), "vllm", 32)
    assert "Apple" in problem(Target(gpu(vendor="Apple", kind="unified")), "vllm", 32)
    assert "one device" in problem(Target(gpu(), 2), "qkit", 32)
    assert "NVIDIA" in problem(Target(gpu(vendor="AMD", capability="gfx942")), "qkit", 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "trt"}, "unknown engine 'trt'"),
        ({"context": 0}, "1 or more, not 0 and 1"),
        ({"batch": -1}, "1 or more, not 10 and -1"),
        ({"kv_dtype": "I3"}, "no type of a KV cache"),
    ],
)
def test_refusals(change, message):
    arch = shape("Qwen2.5-0.5B")
    given = {"engine": "vllm", "context": 10, "batch": 1, **change}
    with pytest.raises(QkitError, match=message):
        memory(arch, of_architecture(arch), Target(gpu()), **given)


def test_sizes_depend_on_the_device_by_its_number_and_step_alone():
    arch = shape("Gemma-3-27B")
    weights = of_architecture(arch)
    a, b = (sizes(arch, weights, Target(gpu(gib)), "vllm") for gib in (24.0, 48.0))
    assert [a.kv_cache(n, 3) for n in (100, 5000)] == [b.kv_cache(n, 3) for n in (100, 5000)]
    c = sizes(arch, weights, Target(gpu(200.0)), "vllm")  # a larger step is more beside the window
    assert c.kv_cache(50_000, 1) > a.kv_cache(50_000, 1)
