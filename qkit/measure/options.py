"""The options of a profile: `qkit profile` and `profile()` take them from here."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import number, option, several, size, whole


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
    allow_overlap: bool = option(False, "score on text that the model may be calibrated on; the report says so")
    max_kld: float | None = option(None, "exit with 1 if the mean KL divergence is above X", parse=number, metavar="X")
    min_tps: float | None = option(None, "exit with 1 if generate gives below X tokens/s", parse=number, metavar="X")
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
