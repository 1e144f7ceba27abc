"""The README's table: qkit and its peers on the two models that packages ship, one protocol, one machine.

    python benchmarks/table.py --work DIR --calib c4.utf8 --text wiki.test.raw [--gemma gemma.gguf]
        [--peer llmcompressor=PYTHON] [--peer gptqmodel=PYTHON] [--peer autoround=PYTHON] [--peer llamacpp=PYTHON]

Every conversion runs in a process of its own (its seconds exclude imports, its peak memory does not). Quality is
measured by qkit's own evaluation for everybody, from the folder or file each tool wrote: the first 16 x 512 tokens
of --text, BOS in place of each chunk's first token where the model has one, every position, bfloat16 forward,
against the bfloat16 source. Calibration: 64 x 512 tokens of --calib, the first for the peers.
Speed: 512-token prompt, 64 tokens decoded, batch 1, each in its own engine. Rows already in DIR/rows.json are kept:
delete a row to measure it again. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"
CHUNKS, LENGTH = 16, 512


def quantizers(peers: dict[str, str], calib: Path, group: int) -> dict[str, tuple[str, list[str]]]:
    """row -> (what it starts from, command with {source} and {out})."""
    qkit = [sys.executable, "-m", "qkit", "convert", "{source}", "-o", "{out}", "--json"]
    gptq = [*qkit, "--method", "gptq", "--calib", str(calib), "--calib-samples", "64", "--calib-len", "512"]
    rows = {
        "qkit RTN W4": ("folder", [*qkit, "--method", "rtn"]),
        "qkit RTN W4, clip search": ("folder", [*qkit, "--method", "rtn", "--clip-search"]),
        "qkit GPTQ W4": ("folder", gptq),
        "qkit GPTQ W4, gptq format": ("folder", [*gptq, "--format", "gptq"]),
        "qkit RTN W8": ("folder", [*qkit, "--scheme", "w8a16"]),
    }
    common = ["{source}", "{out}", "--calib", str(calib), "--group-size", str(group)]
    if python := peers.get("llmcompressor"):
        script = [python, str(PEERS / "llmcompressor_quantize.py"), *common]
        rows["llm-compressor RTN W4"] = ("folder", [*script, "--method", "rtn"])
        rows["llm-compressor GPTQ W4"] = ("folder", [*script, "--method", "gptq"])
    if python := peers.get("gptqmodel"):
        rows["GPTQModel GPTQ W4"] = ("folder", [python, str(PEERS / "gptqmodel_quantize.py"), *common])
    if python := peers.get("autoround"):
        rows["AutoRound W4, 0 iterations"] = ("folder", [python, str(PEERS / "autoround_quantize.py"), *common])
    if python := peers.get("llamacpp"):
        for kind in ("Q4_0", "Q4_K_M", "Q8_0"):
            script = [python, str(PEERS / "llamacpp_quantize.py"), "{source}", "{out}", "--type", kind]
            rows[f"llama.cpp {kind}"] = ("gguf", script)
    return rows


def quantize(command: list[str], source: Path, out: Path, log: Path) -> dict[str, Any]:
    """Run one quantizer; its last line of stdout (or all of it) is JSON with seconds and peak memory."""
    for path in (out, out.with_name(out.name + ".qkit-partial")):
        if path.is_dir():
            shutil.rmtree(path)
    filled = [part.format(source=source, out=out) for part in command]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    with open(log, "w") as errors:
        done = subprocess.run(filled, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(filled)} failed, see {log}")
    text = done.stdout.strip()
    facts = json.loads(text if text.startswith("{") and "\n" in text else text.splitlines()[-1])
    return {
        "seconds": facts.get("seconds", facts.get("seconds_measured")),
        "peak_memory": facts.get("peak_memory_bytes", facts.get("peak_memory_measured_bytes")),
    }


def evaluation_tokens(source: Path, text: Path) -> Any:
    from qkit.runtime import load_tokenizer

    tokenizer = load_tokenizer(str(source))
    import torch

    raw = text.read_text(encoding="utf-8")[: CHUNKS * LENGTH * 12]
    ids = tokenizer(raw, add_special_tokens=False)["input_ids"][: CHUNKS * LENGTH]
    tokens = torch.tensor(ids).view(CHUNKS, LENGTH)
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        tokens[:, 0] = tokenizer.bos_token_id
    return tokens


def quality(models: dict[str, Any], base: Any, tokens: Any) -> dict[str, dict[str, float]]:
    """Each model against `base`, chunk by chunk so that the base runs once for all of them."""
    from qkit.measure.quality import compare, model_logits

    sums = {name: dict.fromkeys(("nll", "kld", "same_top"), 0.0) for name in models}
    for chunk in tokens.split(1):
        logits = list(model_logits(base, chunk))
        for name, model in models.items():
            scores = compare(logits, model_logits(model, chunk), chunk)["full"]
            sums[name]["nll"] += math.log(scores.perplexity.value) / len(tokens)
            sums[name]["kld"] += scores.against.kld.value / len(tokens)
            sums[name]["same_top"] += scores.against.same_top.value / len(tokens)
    return {name: {"perplexity": math.exp(s.pop("nll")), **s} for name, s in sums.items()}


def speed(model: Any) -> dict[str, float]:
    """Median of three: 512-token prefill, then 64 greedy tokens with the cache, one at a time."""
    import torch

    prompt = torch.arange(1, 513, device=model.device).view(1, -1)
    prefill, decode = [], []

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        for repeat in range(4):
            started = now()
            out = model(prompt, use_cache=True, logits_to_keep=1)
            first = now()
            cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            for _ in range(64):
                out = model(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            done = now()
            if repeat:
                prefill.append(512 / (first - started))
                decode.append(64 / (done - first))
    return {"prefill_tokens_per_s": statistics.median(prefill), "decode_tokens_per_s": statistics.median(decode)}


def weight_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.glob("*.safetensors"))


def measure(name: str, gguf: Path, group: int, args: argparse.Namespace, rows: dict[str, Any], save: Any) -> None:
    """Three passes, each row kept as soon as it is known: conversions, then quality, then speed."""
    import qkit

    work = args.work / name
    work.mkdir(parents=True, exist_ok=True)
    source = work / "bf16"
    if not source.exists():
        qkit.convert(str(gguf), source, format="safetensors")
    peers = dict(p.split("=", 1) for p in args.peer)
    paths = {"bf16 source": source}
    rows.setdefault(f"{name} | bf16 source", {"bytes": weight_bytes(source)})
    for row, (start, command) in quantizers(peers, args.calib, group).items():
        if args.only and row not in args.only:
            continue
        out = work / row.replace(" ", "-").replace(",", "")
        out = out.with_suffix(".gguf") if start == "gguf" else out
        if f"{name} | {row}" not in rows:
            facts = quantize(command, source if start == "folder" else gguf, out, work / f"{out.name}.log")
            rows[f"{name} | {row}"] = {**facts, "bytes": weight_bytes(out)}
            save()
            print(f"{name} | {row}: {json.dumps(facts)}", file=sys.stderr, flush=True)
        paths[row] = out
    base = qkit.load(str(source))
    parameters = sum(p.numel() for p in base.parameters())
    for row in paths:
        facts = rows[f"{name} | {row}"]
        facts["bits_per_weight"] = 8 * facts["bytes"] / parameters
    if args.convert_only:
        return
    unknown = {row: qkit.load(str(path)) for row, path in paths.items() if "kld" not in rows[f"{name} | {row}"]}
    for row, facts in quality(unknown, base, evaluation_tokens(source, args.text)).items():
        rows[f"{name} | {row}"] |= facts
    save()
    del unknown
    gc.collect()
    for row, path in paths.items():
        facts = rows[f"{name} | {row}"]
        if "decode_tokens_per_s" in facts or not row.startswith(("qkit", "bf16", "llama.cpp")):
            continue
        if path.suffix == ".gguf":
            script = [peers["llamacpp"], str(PEERS / "llamacpp_speed.py"), str(path)]
            done = subprocess.run(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            facts |= json.loads(done.stdout.splitlines()[-1])
        else:
            facts |= speed(qkit.load(str(path)))
        save()


def markdown(rows: dict[str, Any]) -> str:
    columns = [
        ("MB", "bytes", lambda v: f"{v / 1e6:.0f}"),
        ("bits/weight", "bits_per_weight", lambda v: f"{v:.2f}"),
        ("convert", "seconds", lambda v: f"{v:.1f} s"),
        ("peak memory", "peak_memory", lambda v: f"{v / 1e9:.2f} GB"),
        ("perplexity", "perplexity", lambda v: f"{v:.2f}"),
        ("KL", "kld", lambda v: f"{v:.4f}"),
        ("top-1", "same_top", lambda v: f"{v:.3f}"),
        ("decode tok/s", "decode_tokens_per_s", lambda v: f"{v:.0f}"),
        ("prefill tok/s", "prefill_tokens_per_s", lambda v: f"{v:.0f}"),
    ]
    lines = [f"| | {' | '.join(c for c, _, _ in columns)} |", "|---|" + "---|" * len(columns)]
    for row, facts in rows.items():
        cells = [form(facts[key]) if facts.get(key) is not None else "" for _, key, form in columns]
        lines.append(f"| {row.replace(' | ', ', ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--gemma", type=Path, help="gemma-3-270m-q4_k_m.gguf, as its package assembles it")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only", action="append", metavar="ROW", help="only the row of this name")
    parser.add_argument("--convert-only", action="store_true", help="stop before quality and speed")
    args = parser.parse_args()

    from qkit.sources.demo import demo_path

    path = args.work / "rows.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    models = {"Gemma-3-270M": (args.gemma, 128)} if args.gemma else {}
    models["SmolLM2-135M"] = (demo_path(), 64)
    for name, (gguf, group) in models.items():
        measure(name, gguf, group, args, rows, lambda: path.write_text(json.dumps(rows, indent=1)))
    path.write_text(json.dumps(rows, indent=1))
    print(markdown(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
