"""The options of a profile: `qkit profile` and `profile()` take them from here."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import number, option, positive, several, whole


@dataclass(frozen=True)
class Options:
    """What the user chose; None where qkit chooses."""

    baseline: str | None = option(
        None,
        "the model to compare with: KL divergence, top-1 agreement; without one perplexity alone",
        metavar="SOURCE",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:<index>", metavar="NAME")
    context: int | None = option(
        None,
        "tokens of context to measure memory and speed at; default: 512, or what the model can take",
        parse=whole(8),
        metavar="N",
    )
    batch: tuple[int, ...] = option(
        (1,), "batch sizes; --min-tps holds for the first", parse=several(whole(1), 1), metavar="N"
    )
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
        "exit with 1 if generate, or --endpoint at its first concurrency, gives below X tokens/s",
        parse=number,
        metavar="X",
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the checkpoint (its tokenizer's)")
    out: str | None = option(None, "folder for the report; default: qkit-profile/MODEL", short="-o", metavar="DIR")
    chunks: int = option(
        16, "chunks of 512 tokens to score, as far as the text goes", parse=whole(1), command_line=False
    )
