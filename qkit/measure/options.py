"""The options of a profile: `qkit profile` and `profile()` take them from here."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import number, option, positive, several, size, text, whole


@dataclass(frozen=True)
class Options:
    """What the user chose; None where qkit chooses."""

    baseline: str | None = option(
        None,
        "the model to compare with: KL divergence, top-1 agreement; without one perplexity alone",
        metavar="SOURCE",
    )
    device: tuple[str, ...] = option(
        ("auto",),
        "auto, cpu, cuda or cuda:<index> to measure here; to predict, devices of the catalogue (`qkit devices`), "
        "h100-sxm:2 for two, a JSON file that describes a card, or all",
        parse=several(text, 1),
        metavar="NAME",
    )
    context: int | None = option(
        None,
        "tokens of context to measure memory and speed at; default: 512, or what the model can take",
        parse=whole(8),
        metavar="N",
    )
    batch: tuple[int, ...] = option(
        (1,), "batch sizes; --min-tps holds for the first", parse=several(whole(1), 1), metavar="N"
    )
    predict: bool = option(False, "predict on a device that is here, too; nothing is loaded")
    format: str | None = option(
        None, "predict the model as `qkit convert --format NAME` would write it", metavar="NAME"
    )
    scheme: str | None = option(None, "predict it in this scheme", metavar="NAME")
    kv_cache: str | None = option(None, "predict with a KV cache of fp8, or q8_0 or q4_0 of llama.cpp", metavar="TYPE")
    price_per_hour: float | None = option(
        None, "dollars an hour of the predicted device; default: the catalogue's, dated", parse=number, metavar="X"
    )
    api_price: tuple[float, ...] = option(
        (), "dollars a million tokens of a hosted model, or in and out; default: a dated one", parse=several(number),
        metavar="X",
    )  # fmt: skip
    utilization: float = option(0.5, "share of the hours in which a rented device computes", parse=number, metavar="X")
    input_tokens: float = option(3.0, "tokens of prompts to each new one, for costs", parse=number, metavar="X")
    text: str | None = option(None, "evaluation text; default: text that comes with qkit or Python", metavar="FILE")
    engine: str | None = option(
        None,
        "also sweep batch and context in an engine: qkit, vllm or llama.cpp, on the format it runs",
        metavar="NAME",
    )
    engine_python: str | None = option(
        None, "the Python that has the engine installed; default: this one", metavar="PATH"
    )
    sweep: tuple[int, ...] = option(
        (2048, 8192, 32768),
        "tokens of context that --engine measures at each --batch, where they fit",
        parse=several(whole(8), 1),
        metavar="N",
    )
    endpoint: str | None = option(
        None,
        "load a running OpenAI-compatible server instead, such as http://localhost:8000/v1; MODEL is then its name "
        "there, by default the first that the server lists",
        metavar="URL",
    )
    concurrency: tuple[int, ...] = option(
        (1, 2, 4, 8, 16, 32), "requests at a time, of --endpoint", parse=several(whole(1, 4096), 1), metavar="N"
    )
    requests: int | None = option(
        None,
        "requests at each concurrency; default: 8, or twice the concurrency where that is more",
        parse=whole(1),
        metavar="N",
    )
    max_tokens: int = option(64, "new tokens of each request to --endpoint", parse=whole(2), metavar="N")
    level_seconds: float = option(
        60.0, "seconds after which a concurrency sends no more requests", parse=positive, metavar="S"
    )
    timeout: float = option(300.0, "seconds after which a request has failed", parse=positive, metavar="S")
    api_key_file: str | None = option(None, "file that holds the key of --endpoint", metavar="FILE")
    allow_overlap: bool = option(False, "score on text that the model may be calibrated on; the report says so")
    max_kld: float | None = option(None, "exit with 1 if the mean KL divergence is above X", parse=number, metavar="X")
    min_tps: float | None = option(
        None,
        "exit with 1 if generate, or --endpoint at its first concurrency, or a prediction, gives below X tokens/s",
        parse=number,
        metavar="X",
    )
    max_memory: int | None = option(
        None,
        "memory to stay within, such as 8GiB; default: what is free. What does not fit runs block by block, untimed",
        parse=size,
        metavar="SIZE",
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the checkpoint (its tokenizer's)")
    out: str | None = option(None, "folder for the report; default: qkit-profile/MODEL", short="-o", metavar="DIR")
    chunks: int = option(
        16, "chunks of 512 tokens to score, as far as the text goes", parse=whole(1), command_line=False
    )
