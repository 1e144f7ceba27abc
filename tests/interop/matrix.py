"""The README's support matrix, from what the interop tests run: format x scheme x client, and how it is checked.

python tests/interop/matrix.py        prints it; a test of the suite compares it with the README
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from interop import clients, test_bitsandbytes, test_clients, test_discontinued, test_experts, test_gguf

from qkit.formats import FORMATS

# The clients as users know them, by the runs of `test_clients.RUNS`.
RUNS = {
    "compressed-tensors": "transformers + compressed-tensors 0.20",
    "compressed-tensors-0.17": "transformers + compressed-tensors 0.17",
    "gptqmodel": "gptqmodel 7.7",
    "gptqmodel-in-transformers": "transformers + optimum + gptqmodel",
    "vllm": "vLLM 0.32, its own CPU kernels",
    "vllm with qkit": "vLLM 0.32 with qkit's kernels",
}
DISCONTINUED = {
    required.partition("==")[0]: required.replace("==", " ")
    for required in clients.CLIENTS["discontinued"].install[-1]
    if "==" in required
}
EVERY_WEIGHT = "every weight, bit for bit"
LOGITS, OWN_CODE, SAME_FILES = "logits", "logits, dequantized by the client's code", "the same files, and logits"


def rows() -> dict[tuple[str, str], dict[str, str]]:
    """(format, scheme) -> client -> how."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for run, (_, _, names) in test_clients.RUNS.items():
        for name in names:
            _, fmt, scheme, _ = test_clients.FOLDERS[name]
            if scheme == "mixed":
                scheme = "mixed (w4a16, w8a16, kept)"
            dequantized = run.startswith("compressed") and (name in test_clients._FLOATS or scheme.endswith("asym"))
            how = OWN_CODE if dequantized else LOGITS
            found.setdefault((fmt, scheme), {})[RUNS[run]] = how
    for package, fmt, scheme, _ in test_discontinued.CASES:
        found.setdefault((fmt, scheme), {})[DISCONTINUED[package]] = EVERY_WEIGHT
    for scheme in dict.fromkeys("w4a16-asym" if asymmetric else "w4a16" for _, asymmetric in test_experts.CASES):
        families = [f for f, asymmetric in test_experts.CASES if asymmetric == scheme.endswith("asym")]
        client = {"vLLM 0.32, its loader and its dequantization": f"every weight of {', '.join(families)}, bit for bit"}
        found[("compressed-tensors", f"{scheme}, experts out of one tensor")] = client
    for scheme in test_bitsandbytes.SCHEMES:
        how = SAME_FILES if scheme in test_bitsandbytes.SMOL else "the same files"
        found[("bnb", scheme)] = {"transformers + bitsandbytes 0.50": how}
    llama = f"llama.cpp (llama-cpp-python {clients.CLIENTS['llamacpp'].install[1][1].rpartition('=')[2]})"
    for _, scheme, _ in test_gguf.REAL.values():
        found[("gguf", scheme)] = {llama: "logits, perplexity, tokens"}
    others = [mix for mix in test_gguf.MIXES if ("gguf", mix) not in found and mix != "mxfp4"]
    found[("gguf", ", ".join(others))] = {llama: "the types that llama-quantize chooses"}
    found[("gguf", "none (float32 export)")] = {llama: f"logits of {', '.join(test_gguf.TINY)}"}
    return found


def table() -> str:
    lines = ["| format | scheme | client | checked |", "|---|---|---|---|"]
    found = sorted(rows().items(), key=lambda row: list(FORMATS).index(row[0][0]))
    for (fmt, scheme), by_client in found:
        by_how: dict[str, list[str]] = {}
        for client, how in by_client.items():
            by_how.setdefault(how, []).append(client)
        lines += [f"| {fmt} | {scheme} | {'; '.join(names)} | {how} |" for how, names in by_how.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
