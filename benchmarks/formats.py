"""Every format and scheme on one model: bytes of the result and KL divergence against the source.

    python benchmarks/formats.py SOURCE --work DIR --calib c4.utf8 --text wiki.test.raw [--only ROW ...]

Conversions by `qkit convert`, each in a process of its own; quality as in table.py: the first 16 x 512 tokens of
--text, every position, bfloat16 forward, against the source expanded to bfloat16. GGUF rows are read back by qkit,
whose values are llama.cpp's. Rows already in DIR/formats.json are kept. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

from table import evaluation_tokens, quality, quantize, weight_bytes

AT_ONCE = 6  # models in memory beside the baseline
CALIBRATED = {
    "compressed-tensors": ("w4a16", "w4a16-asym"),
    "gptq": ("w4a16", "w3a16"),
    "gptq_v2": ("w4a16-asym", "w2a16-asym"),
    "awq": ("w4a16-asym",),
    "gguf": ("q6_k", "q5_k_m", "q4_k_m", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "mxfp4", "q3_k_m", "q2_k"),
}
ROUNDED = {
    "compressed-tensors": ("w8a16", "w8a8", "fp8", "fp8-block", "nvfp4a16", "mxfp4a16"),
    "gptq": ("w8a16",),
    "bnb": ("int8", "nf4", "nf4-dq", "fp4", "fp4-dq"),
    "gguf": ("q8_0", "q4_k_m", "q4_0"),
}
MORE = (
    ("compressed-tensors", "w4a16", ("--head", "8bit")),
    ("compressed-tensors", "w4a16", ("--head", "4bit")),
    ("compressed-tensors", "fp8", ("--kv-cache", "fp8")),
)


def rows(calib: Path) -> dict[str, list[str]]:
    """Row -> options of `qkit convert`."""
    text = ["--calib", str(calib)]
    found = {}
    for table in (CALIBRATED, ROUNDED):
        for fmt, schemes in table.items():
            method = "rtn" if table is ROUNDED else "imatrix" if fmt == "gguf" else "gptq"
            more = ["--method", method, *(text if table is CALIBRATED else ())]
            for scheme in schemes:
                found[f"{fmt} | {scheme} | {method}"] = ["--format", fmt, "--scheme", scheme, *more]
    for fmt, scheme, options in MORE:
        method = "rtn" if scheme == "fp8" else "gptq"
        found[f"{fmt} | {scheme} {' '.join(options)} | {method}"] = [
            "--format", fmt, "--scheme", scheme, "--method", method, *text, *options,
        ]  # fmt: skip
    return found


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.glob("*.gguf")) or weight_bytes(path)


def markdown(measured: dict[str, dict[str, Any]]) -> str:
    lines = ["| format | scheme | method | MB | bits/weight | KL | top-1 |", "|---|---|---|---|---|---|---|"]
    for row, facts in measured.items():
        cells = (
            f"{facts['bytes'] / 1e6:.1f}",
            f"{facts['bits_per_weight']:.2f}",
            f"{facts['kld']:.4f}",
            f"{facts['same_top']:.3f}",
        )
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", action="append", metavar="ROW")
    args = parser.parse_args()

    import qkit

    args.work.mkdir(parents=True, exist_ok=True)
    base_folder, path = args.work / "bf16", args.work / "formats.json"
    if not base_folder.exists():
        qkit.convert(str(args.source), base_folder, format="safetensors", scheme="none")
    measured: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    wanted = {row: options for row, options in rows(args.calib).items() if not args.only or row in args.only}
    folders = {row: args.work / row.replace(" | ", "-").replace(" ", "-") for row in wanted}
    command = [sys.executable, "-m", "qkit", "convert", "{source}", "-o", "{out}", "--json"]
    for row, options in wanted.items():
        if row not in measured:
            out = folders[row]
            facts = quantize([*command, *options], base_folder, out, args.work / f"{out.name}.log")
            measured[row] = {**facts, "bytes": size(out)}
            path.write_text(json.dumps(measured, indent=1))
            print(row, json.dumps(measured[row]), file=sys.stderr, flush=True)
    base = qkit.load(str(base_folder))
    parameters = sum(p.numel() for p in base.parameters())
    tokens = evaluation_tokens(base_folder, args.text)
    left = [row for row in wanted if "kld" not in measured[row]]
    for start in range(0, len(left), AT_ONCE):
        models = {row: qkit.load(str(folders[row])) for row in left[start : start + AT_ONCE]}
        for row, facts in quality(models, base, tokens).items():
            measured[row] |= {**facts, "bits_per_weight": 8 * measured[row]["bytes"] / parameters}
        del models
        gc.collect()
        path.write_text(json.dumps(measured, indent=1))
    print(markdown({row: measured[row] for row in wanted}))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
