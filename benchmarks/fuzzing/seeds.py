"""Files in order, small and of every kind that qkit reads: what the mutations begin with."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

from .mutate import Case

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # its tiny models, GGUF files and reports
SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 260, "num_attention_heads": 2,
         "num_key_value_heads": 1,
         "num_hidden_layers": 1}  # fmt: skip
SCHEMES = {
    "ct-w4": {}, "ct-w4-asym": {"scheme": "w4a16-asym"}, "ct-w8a8": {"scheme": "w8a8"}, "ct-fp8": {"scheme": "fp8"},
    "ct-fp8-block": {"scheme": "fp8-block"}, "ct-nvfp4": {"scheme": "nvfp4a16"}, "ct-mxfp4": {"scheme": "mxfp4a16"},
    "gptq": {"format": "gptq"}, "gptq-3": {"format": "gptq", "scheme": "w3a16"}, "awq": {"format": "awq"},
    "bnb-nf4": {"format": "bnb"}, "bnb-int8": {"format": "bnb", "scheme": "int8"},
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if x %}<|a|>{% endif %}"
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ndatasets: [a/b, c/d]\ntags:\n- x\n---\n# A model\n"


def case_of(folder: Path) -> Case:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def plain(work: Path) -> Case:
    """A folder of two shards with an index, a card, a template and a tokenizer."""
    from models import make_model

    case = case_of(make_model(work / "plain", **SMALL, max_shard_size="40KB"))
    return {**case, "README.md": CARD.encode(), "chat_template.jinja": TEMPLATE.encode()}


def quantized(work: Path) -> list[Case]:
    """The model in each format and scheme that qkit writes; a folder of fp8 blocks, which it reads."""
    import qkit
    from qkit.errors import QkitError

    source = work / "plain-whole"
    if not source.exists():
        from models import make_model

        make_model(source, **{**SMALL, "intermediate_size": 128, "hidden_size": 128, "num_attention_heads": 4})
    cases = []
    for name, options in SCHEMES.items():
        try:
            qkit.convert(str(source), work / name, method="rtn", **options)
        except QkitError as error:
            print(f"no seed {name}: {error.message}", file=sys.stderr)
            continue
        cases.append(case_of(work / name))
    cases.append(_fp8(next(case for case in cases if b'"float-quantized"' in case["config.json"])))  # type: ignore[operator]
    return cases


def _fp8(case: Case) -> Case:
    """A folder as DeepSeek has them, made of one of compressed-tensors' blocks."""
    from .mutate import safetensors_bytes

    file = _weights(case)
    raw = case[file]
    assert isinstance(raw, bytes)
    length = int.from_bytes(raw[:8], "little")
    table, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    tensors = {}
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        shape, dtype, body = entry["shape"], entry["dtype"], data[slice(*entry["data_offsets"])]
        if name.endswith("weight_scale"):
            out, in_ = table[name.removesuffix("_scale")]["shape"]
            shape = [-(-out // 128), in_ // 128]
            name, dtype, body = name + "_inv", "F32", b"\0\0\x80\x3f" * (shape[0] * shape[1])
        tensors[name] = [dtype, shape, body]
    config = json.loads(case["config.json"])
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                                     "activation_scheme": "dynamic", "modules_to_not_convert": []}  # fmt: skip
    kept = {name: content for name, content in case.items() if name not in ("qkit_manifest.json", file)}
    kept = {name: content for name, content in kept.items() if not name.endswith(".index.json")}
    return {**kept, "config.json": json.dumps(config).encode(), "model.safetensors": safetensors_bytes(tensors)}


def _weights(case: Case) -> str:
    return next(name for name in case if name.endswith(".safetensors"))


def files(work: Path) -> list[Case]:
    """Single files of tensors, of many types."""
    return [{"model.safetensors": case[_weights(case)]} for case in quantized(work)[:6]]


def ggufs(work: Path) -> list[Case]:
    """Four architectures, in floats and in blocks, with either kind of vocabulary."""
    import gguf_files
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    cases = []
    few = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    kinds = gguf_files.gguf.GGMLQuantizationType
    for arch, family, more in (
        ("llama", "llama", {}), ("gemma3", "gemma3_text", {"sliding_window": 8}), ("qwen2", "qwen2", {}),
        ("qwen3moe", "qwen3_moe", few),
    ):  # fmt: skip
        shape = {**SMALL, "head_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": False}
        config = AutoConfig.for_model(family, **shape, **more)
        torch.manual_seed(1)
        state = AutoModelForCausalLM.from_config(config).state_dict()
        tensors: dict[str, Any] = gguf_files.convert(_one_by_one(state), config, arch)
        keys = gguf_files.base_keys(config)
        vocab = {**gguf_files.byte_vocab(260), "chat_template": TEMPLATE}
        if arch == "gemma3":
            keys["attention.sliding_window"] = 8
            pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "a"]
            vocab = {"model": "llama", "tokens": pieces, "scores": [0.0] * 260, "token_type": [2, 3, 3, *[6] * 256, 1]}
        if arch == "qwen3moe":
            keys |= {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32}
        if arch == "llama":
            for name in [name for name, values in tensors.items() if values.ndim == 2]:
                tensors[name] = (tensors[name], kinds.Q4_0 if "attn" in name else kinds.Q8_0)
        folder = work / f"gguf-{arch}"
        folder.mkdir(parents=True)
        cases.append(case_of(gguf_files.write(folder / "m.gguf", arch, keys, tensors, vocab).parent))
    return cases


def _one_by_one(state: dict[str, Any]) -> dict[str, Any]:
    """Experts that transformers holds in one tensor, as tensors of their own."""
    found = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".experts.")
        for i, each in enumerate(tensor if stem else ()):
            fused = last == "gate_up_proj"
            names = ("gate_proj", "up_proj") if fused else ("down_proj",)
            for own, matrix in zip(names, each.chunk(2) if fused else (each,), strict=True):
                found[f"{stem}.experts.{i}.{own}.weight"] = matrix
        if not stem:
            found[name] = tensor
    return found


def adapters(work: Path) -> list[Case]:
    """A base and a LoRA adapter for it, with patterns, DoRA's magnitudes and a full copy."""
    import torch
    from models import make_model
    from safetensors.torch import save

    base = {f"base/{name}": content for name, content in case_of(make_model(work / "base", **SMALL)).items()}
    stem = "base_model.model.model.layers.0.self_attn."
    tensors = {stem + "q_proj.lora_A.weight": torch.ones(4, 64), stem + "q_proj.lora_B.weight": torch.ones(64, 4),
               stem + "q_proj.lora_magnitude_vector": torch.ones(64), stem + "v_proj.lora_A.weight": torch.ones(2, 64),
               stem + "v_proj.lora_B.weight": torch.ones(32, 2), stem + "v_proj.lora_magnitude_vector": torch.ones(32),
               "base_model.model.model.norm.weight": torch.ones(64)}  # fmt: skip
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2},
              "alpha_pattern": {".*q_proj": 3}, "base_model_name_or_path": "a/b", "modules_to_save": ["norm"],
              "use_dora": True, "use_rslora": False, "fan_in_fan_out": False, "init_lora_weights": True, "bias": "none",
              "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    return [
        {
            **base,
            "adapter/adapter_config.json": json.dumps(config).encode(),
            "adapter/adapter_model.safetensors": save(tensors),
        }
    ]


def configs(work: Path) -> list[Case]:
    """One config for each family that is known, those with parts of other kinds, and published ones."""
    from architectures import CHANGED, SHRUNK
    from transformers import AutoConfig

    cases: list[Case] = [
        {"config.json": p.read_bytes()} for p in sorted((ROOT / "benchmarks/configs").rglob("config.json"))
    ]
    for table in (SHRUNK, CHANGED):
        for kind, values in table.items():
            try:
                config = AutoConfig.for_model(kind, **values).to_dict()
            except Exception as error:  # a family of another release
                print(f"no seed {kind}: {error}", file=sys.stderr)
                continue
            cases.append({"config.json": json.dumps(config, default=str).encode()})
    return cases


def recipes(work: Path) -> list[Case]:
    rules = """
- modules: '*.down_proj'
  scheme: w8a16
  group_size: 32
- modules: ['*.q_proj', 'model.layers.0.*']
  scheme: keep
- {modules: '*', scheme: w4a16, group_size: channel}
"""
    base = {f"base/{name}": content for name, content in plain(work).items()}
    return [{**base, "recipe.yaml": rules.encode()},
            {**base, "recipe.yaml": json.dumps([{"modules": "*", "scheme": "w8a16"}]).encode()}]  # fmt: skip


def texts(work: Path) -> list[Case]:
    lines = [json.dumps({"text": f"line {i}"}) for i in range(3)]
    lines += [json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})]
    rows = "\n".join(lines).encode()
    tokenizer = {f"base/{n}": c for n, c in plain(work).items()}
    found: list[Case] = [{**tokenizer, "t.jsonl": rows}, {**tokenizer, "t.txt": "Text, ä.\nMore.".encode()},
                         {**tokenizer, "t.jsonl.gz": gzip.compress(rows)}]  # fmt: skip
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return found
    for column in ({"text": ["a", "b"]}, {"messages": [[{"role": "user", "content": "hi"}]]}):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(column), buffer)
        found.append({**tokenizer, "t.parquet": buffer.getvalue()})
    return found


def cards(work: Path) -> list[Case]:
    """A model's config, and a card of three fields, one that says everything, and one as the catalogue has it."""
    price = {"what": "rent", "usd_per_hour": 1.5, "market": "m", "date": "2026-01-01", "source": "a list of prices"}
    entry = json.loads((ROOT / "profiles/hardware/nvidia-geforce.json").read_text())["devices"][0]
    least = {"name": "Card", "memory_gib": 24, "bandwidth_gbs": 900}
    documents = [
        least,
        {**least, "usable_gib": 22, "vendor": "NVIDIA", "arch": "x", "kind": "gpu", "prices": [price], "sources": {}},
        {**entry, "sources": {"*": "me"}},
    ]
    model = {f"base/{name}": content for name, content in configs(work)[0].items()}
    return [{**model, "card.json": json.dumps(document).encode()} for document in documents]


def reports(work: Path) -> list[Case]:
    """Two reports each, of every kind."""
    found: list[Case] = []
    documents = [p.read_bytes() for p in sorted((ROOT / "profiles/reports").rglob("*.json"))]
    documents += _made_reports()
    for document in documents:
        if len(document) < 200_000:
            found.append({"before.json": document, "after.json": document})
    return found


def _made_reports() -> list[bytes]:
    import reports as made

    from qkit.report.write import to_json

    return [to_json(make()).encode() for make in (made.make, made.compared, made.several)]


def streams(work: Path) -> list[Case]:
    """What a server sends: status line, headers, and events or a document."""

    def event(**more: Any) -> str:
        return "data: " + json.dumps({"id": "1", "model": "m", "choices": [], **more})

    def chunk(finish: str | None = None, **what: Any) -> str:
        return event(choices=[{"index": 0, "finish_reason": finish, **what}])

    end = [chunk("length", text=""), event(usage={"completion_tokens": 3, "prompt_tokens": 4}), "data: [DONE]"]
    events = [[*[chunk(text="a")] * 3, *end], [*[chunk(delta={"content": "a"})] * 3, *end]]
    answers = [("200 OK", "text/event-stream", "\n\n".join(each)) for each in events]
    error = {"error": {"message": "no", "detail": [{"msg": "x"}]}}
    answers.append(("400 Bad", "application/json", json.dumps(error)))
    answers.append(("200 OK", "application/json", json.dumps({"object": "list", "data": [{"id": "m"}]})))
    answers.append(("200 OK", "application/json", json.dumps({"usage": {"prompt_tokens": 4}})))
    return [
        {"reply.sse": f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n\r\n{body}".encode()}
        for status, kind, body in answers
    ]
