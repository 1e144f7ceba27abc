"""The options of a conversion: `qkit convert`, `convert()` and the plan take them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import QkitError
from ..options import option, size, text, whole
from ..spec import CHANNEL


def group_size(value: Any, name: str) -> int:
    """128 or "128" -> 128; "channel", 0 and -1 (as other tools write it) -> CHANNEL."""
    if isinstance(value, str) and value.strip().lower() in ("channel", "-1"):
        return CHANNEL
    if value == -1:
        return CHANNEL
    try:
        return int(whole(0)(value, name))
    except QkitError:
        raise QkitError(f"{name}: {value!r} is not a group size", "use 128, 64, 32 or 'channel'") from None


AS_STORED = "as stored"  # what a plan puts in an option's place where the source's own is kept


def kv_cache(value: Any, name: str) -> str | None:
    """fp8; None for keep."""
    found = str(value).strip().lower()
    if found not in ("keep", "fp8"):
        raise QkitError(f"{name}: {value!r} is not a way to store the KV cache", "use keep or fp8")
    return None if found == "keep" else found


def head(value: Any, name: str) -> str:
    """One of keep, 8bit, 4bit."""
    found = str(value).strip().lower().replace("-", "")
    if found not in ("keep", "8bit", "4bit"):
        raise QkitError(f"{name}: {value!r} is not a way to store the head", "use keep, 8bit or 4bit")
    return found


def ray_address(value: Any, name: str) -> str:
    """auto, local, HOST:PORT or ray://HOST:PORT."""
    found = text(value, name)
    host, _, port = found.removeprefix("ray://").rpartition(":")
    if found not in ("auto", "local") and not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise QkitError(f"{name}: {found!r} is not a Ray cluster", "use auto, HOST:6379, ray://HOST:10001 or local")
    return found


@dataclass(frozen=True)
class Options:
    """What the user chose. Sizes in bytes; None where qkit chooses."""

    format: str = option(
        "compressed-tensors",
        "compressed-tensors, gptq, gptq_v2, awq, bnb, gguf, mxfp4 (gpt-oss) or safetensors (export without quantizing)",
        metavar="NAME",
        identity=True,
    )
    scheme: str | None = option(
        None,
        "w4a16, w8a16, of gptq w3a16 and w2a16, each also with -asym; w8a8, fp8, fp8-block, nvfp4a16, mxfp4a16; none; "
        "of bnb nf4, nf4-dq, fp4, fp4-dq, int8; of gguf q4_k_m, q6_k, iq4_xs and llama.cpp's other names; default: "
        "w4a16, of awq w4a16-asym, of bnb nf4, of gguf q4_k_m",
        metavar="NAME",
    )
    fit: str | None = option(
        None,
        "instead of --scheme: the best one with which the result fits a device of `qkit devices` (h100-sxm:2 for two), "
        "or a JSON file that describes one",
        metavar="DEVICE",
    )
    context: int | None = option(
        None, "of --fit: tokens of each sequence; default: 8192, or what the model takes", parse=whole(1), metavar="N"
    )
    batch: int | None = option(None, "of --fit: sequences at once; default: 1", parse=whole(1), metavar="N")
    recipe: str | None = option(
        None, "rules that give modules schemes of their own, before --scheme (YAML or JSON)", metavar="FILE"
    )
    method: str | None = option(
        None,
        "rtn, gptq or, of gguf, imatrix; default: gptq or imatrix below 8 bits, rtn from 8",
        metavar="NAME",
    )
    group_size: int | None = option(
        None,
        "input channels per scale, or 'channel'; default: the largest of 128, 64, 32 that fits",
        parse=group_size,
        metavar="N",
    )
    block_size: int | None = option(
        None, "of nf4 and fp4: weights that share a scale; default: 64", parse=whole(1), metavar="N"
    )
    head: str | None = option(
        None,
        "the output head: keep, 8bit or 4bit, where the format holds it (compressed-tensors, gptq, gguf); "
        "default: keep, of gguf as llama.cpp does",
        parse=head,
        metavar="HOW",
    )
    kv_cache: str | None = option(
        None,
        "the KV cache where the result is served: keep, or (compressed-tensors) fp8, with calibrated scales; "
        "default: keep",
        parse=kv_cache,
        metavar="HOW",
        identity=True,
    )
    clip_search: bool = option(False, "rtn: search each group's scale for the least error", identity=True)
    calib: str | None = option(None, "calibration text; default: one that comes with qkit", metavar="FILE|HUB_ID")
    calib_samples: int = option(64, "calibration windows", parse=whole(1), metavar="N")
    calib_len: int = option(512, "tokens per window", parse=whole(16), metavar="N")
    device: str = option("auto", "where calibration computes: auto, cpu, cuda or cuda:<index>", metavar="NAME")
    max_memory: int | None = option(None, "memory to stay within, such as 8GiB", parse=size, metavar="SIZE")
    shard_size: int | None = option(
        None,
        "the largest a file of weights gets (one tensor may exceed it), such as 500MB; default: 2GB",
        parse=size,
        metavar="SIZE",
        identity=True,
    )
    ray: str | None = option(
        None,
        "spread the work over a Ray cluster: auto, HOST:6379, ray://HOST:10001, or local for workers here alone",
        parse=ray_address,
        metavar="ADDRESS",
    )
    lora: str | None = option(None, "PEFT adapter to merge first", metavar="DIR")
    skip: tuple[str, ...] = option((), "leave modules alone, such as '*.down_proj'", metavar="PATTERN")
    trust_remote_code: bool = option(False, "run Python code that comes with the checkpoint (its tokenizer's)")
    dry_run: bool = option(False, "print the plan and stop")
    restart: bool = option(False, "discard an interrupted or earlier conversion at OUT")
    verify: bool = option(True, "read the result back and compare it with the source")
